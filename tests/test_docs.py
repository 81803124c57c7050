"""README and docs: what they tell to type is what the command line takes, and what they link to is there."""

import ast
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from typer import Context
from typer.main import get_command

from benchmarks.__main__ import QUESTIONS
from streaming.cli import commands  # noqa: F401  registers every command
from streaming.cli.app import app
from streaming.cli.reference import reference
from streaming.settings import Settings
from tests.conftest import command_here
from tests.streaming.history import commit_batch

CHECKOUT = Path(__file__).parent.parent
PAGES = sorted([CHECKOUT / "README.md", *(CHECKOUT / "docs").glob("*.md")])
# Pages and files of which the command lines are checked, too.
OTHERS = sorted(
    [
        CHECKOUT / "CONTRIBUTING.md", CHECKOUT / "SECURITY.md", CHECKOUT / "docker-compose.yml",
        *(CHECKOUT / "docs" / "decisions").glob("*.md"), *(CHECKOUT / "docs" / "deploy").glob("*.yml"),
        *(CHECKOUT / "examples").rglob("*.md"),
    ]
)  # fmt: skip
CONTAINERS = {"cli": [], "publish": ["publish"]}  # service of the compose file → the first words of its command
QUICK = {("query",), ("predictions",), ("config", "show"), ("config", "init"), ("models", "list")}
ROOT = get_command(app)
ROOT_OPTIONS = {"--home": 1, "--config": 1, "--debug": 0}


def name_of(page: Path) -> str:
    return str(page.relative_to(CHECKOUT))


def lines_of(page: Path, languages: str = "console|shell|bash|sh") -> list[str]:
    """The command lines of the page's blocks, continued lines joined."""
    blocks = re.findall(rf"^```({languages})\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    lines = []
    for language, block in blocks:
        for line in block.replace("\\\n", " ").splitlines():
            if language == "console" and not line.startswith("$ "):
                continue  # what the command says
            lines.append(line.removeprefix("$ "))
    return lines


def indented(page: Path) -> list[str]:
    """The command lines of the page's indented blocks and comments, as the text has them."""
    lines = page.read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    starts = re.compile(r"(?:    |#   )(?:[A-Z_]+=\S+ )*(?:\S*/)?(?:imagestream|docker-compose run) ")
    return [line.lstrip("# ") for line in lines if starts.match(line)]


def ours(line: str) -> Iterator[list[str]]:
    """The arguments of every `imagestream …` in a line of shell."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";|&<>")
    lexer.whitespace_split = True
    command: list[str] = []
    for word in [*lexer, ";"]:
        if not set(word) <= set(";|&<>"):
            command.append(word)
            continue
        while command and re.match(r"^[A-Z_]+=", command[0]):
            command.pop(0)
        if command and Path(command[0]).name == "imagestream":
            yield command[1:]
        elif command[:2] == ["docker-compose", "run"] and (service := CONTAINERS.keys() & set(command)):
            (name,) = service
            yield CONTAINERS[name] + command[command.index(name) + 1 :]
        command = []


def leaf(words: list[str]) -> tuple[tuple[str, ...], Any, list[str]]:
    """(names, command, its arguments) of a command line."""
    while words and words[0] in ROOT_OPTIONS:
        words = words[1 + ROOT_OPTIONS[words[0]] :]
    command, names = ROOT, []
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        assert words[0] in command.commands, f"there is no command {words[0]}"
        command, names, words = command.commands[words[0]], [*names, words[0]], words[1:]
    return tuple(names), command, words


COMMAND_LINES = [
    pytest.param(words, id=f"{page.stem}: {' '.join(words)}"[:100])
    for page in [*PAGES, *OTHERS]
    for line in [*(lines_of(page) if page.suffix == ".md" else []), *indented(page)]
    for words in ours(line)
]


@pytest.mark.parametrize("words", COMMAND_LINES)
def test_command_line_is_one_that_the_program_takes(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    names, command, arguments = leaf(words)
    if not names:  # options of `imagestream` itself
        assert set(arguments) <= {option for param in command.params for option in param.opts} | {"-h", "--help"}
    elif "--help" not in arguments:
        # Raises if it does not take them; an old spelling would be warned of.
        command.make_context(names[-1], arguments, parent=Context(ROOT, info_name="imagestream"))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_named_in_the_text_exist_with_their_options(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for span in re.findall(r"`imagestream (?!\[|<)([^`]+)`", text):
        if "|" in span:
            continue  # several commands at once
        words = [word for word in span.split() if word.isascii() and not word.isupper()]  # without placeholders
        _, command, arguments = leaf(words)
        known = {option for param in command.params for option in (*param.opts, *param.secondary_opts)} | {"--help"}
        assert {word.split("=")[0] for word in arguments if word.startswith("--")} <= known, span


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with a home in it that a stream has filled."""
    folder = tmp_path_factory.mktemp("docs")
    settings = Settings(home=folder / ".imagestream")
    for batch in range(2):
        commit_batch(settings, batch, {0: (4 * batch, 4 * batch + 4)}, bad={4 * batch + 3})
    return folder


QUICK_LINES = {
    line: name_of(page)
    for page in PAGES
    for line in lines_of(page, "console")
    if (found := list(ours(line))) and all(leaf(words)[0] in QUICK for words in found)
}


def test_there_are_questions_to_run() -> None:
    assert len(QUICK_LINES) > 10


@pytest.mark.parametrize("line", QUICK_LINES)
def test_question_in_the_docs_is_answered(line: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("IMAGESTREAM_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(folder)
    first, *_ = shlex.split(line)
    if Path(first).name == "imagestream":
        (words,) = ours(line)
        code, _, said = command_here(*words)
    else:  # a pipe
        monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        shell = subprocess.run(["/bin/bash", "-c", line], capture_output=True, text=True, check=False, timeout=300)
        code, said = shell.returncode, shell.stderr
    assert code == 0, f"{QUICK_LINES[line]}: {said}"


PROMISES = re.findall(r"^\|[^|]+\| `([^`]+)`", (CHECKOUT / "docs" / "promises.md").read_text("utf-8"), re.MULTILINE)


def test_every_promise_names_a_command_that_exists() -> None:
    targets = re.findall(r"^([a-z-]+):.*## ", (CHECKOUT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(PROMISES) > 80
    for command in PROMISES:
        program, *words = shlex.split(command.removeprefix("time ").removeprefix(".venv/bin/"))
        match program, words:
            case "make", [target] | [("demo" as target), _]:
                assert target in targets, command
            case "make", ["test", arguments]:
                paths = arguments.removeprefix("ARGS=").partition(" -k ")[0].split()
                assert all((CHECKOUT / path).exists() for path in paths), command
            case "make", ["bench", arguments]:
                assert set(arguments.removeprefix("ARGS=").split()) <= set(QUESTIONS), command
            case "make", ["soak", arguments]:
                keyword = arguments.removeprefix("ARGS=").removeprefix("-k ").split()[0].strip("'")
                named = (f"{path.stem} {path.read_text('utf-8')}" for path in CHECKOUT.glob("tests/**/test_*.py"))
                assert any(keyword in text for text in named), command
            case "python", ["-m", module, *_]:
                assert find_spec(module), command
            case "imagestream", _:
                leaf(words)
            case _:
                pytest.fail(f"neither make, python nor imagestream: {command}")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{target} is not there"
        if anchor:
            heads = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}, target


def messages() -> Iterator[str]:
    """The texts of the code, with … for what is filled in."""
    for package in ("producer", "streaming", "models"):
        for module in (CHECKOUT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
                    yield "".join(map(str, parts))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value


def test_the_messages_that_are_explained_are_those_of_the_program() -> None:
    page = (CHECKOUT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    tables = re.findall(r"^\| message \|.*\n\|---.*\n((?:\|.*\n)+)", page, re.MULTILINE)
    cells = [row.split("|")[1] for table in tables for row in table.splitlines()]
    fragments = {
        part.strip(" ,?'…") for cell in cells for text in re.findall(r"`([^`]+)`", cell) for part in text.split("…")
    }
    known = list(messages())
    assert len(tables) >= 4
    assert not {part for part in fragments if len(part) > 3 and not any(part in text for text in known)}


def test_the_reference_is_what_the_program_says() -> None:
    file = CHECKOUT / "docs" / "reference.md"
    assert file.read_text(encoding="utf-8") == reference(), (
        "it has changed: .venv/bin/python -m streaming.cli.reference > docs/reference.md"
    )
