"""README and docs: commands are valid and run, links have targets, and messages and reference match the code."""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer import Context
from typer.main import get_command

from benchmarks.__main__ import QUESTIONS
from streaming.cli import commands  # noqa: F401  registers every command
from streaming.cli.app import app
from streaming.cli.reference import reference
from streaming.images.dataset import digit_images, write_images
from streaming.registry import CHALLENGER, open_registry
from streaming.settings import Settings
from tests.conftest import command_here, environment_of
from tests.models import onnx_graphs as graphs
from tests.streaming.history import commit_batch

CHECKOUT = Path(__file__).parent.parent
PAGES = sorted([CHECKOUT / "README.md", *(CHECKOUT / "docs").glob("*.md")])
# Other files whose command lines are checked.
OTHERS = sorted(
    [
        CHECKOUT / "CONTRIBUTING.md", CHECKOUT / "SECURITY.md", CHECKOUT / "docker-compose.yml",
        *(CHECKOUT / "docs" / "decisions").glob("*.md"), *(CHECKOUT / "docs" / "deploy").glob("*.yml"),
        *(CHECKOUT / "examples").rglob("*.md"),
    ]
)  # fmt: skip
CONTAINERS = {"cli": [], "publish": ["publish"]}  # service of the compose file → first words of its command
EXECUTED = {
    ("audit",), ("config", "init"), ("config", "show"), ("erase",), ("label",), ("maintain",), ("predict",),
    ("predictions",), ("query",),
}  # fmt: skip
ROOT = get_command(app)
ROOT_OPTIONS = {"--home": 1, "--config": 1, "--debug": 0}


def name_of(page: Path) -> str:
    return str(page.relative_to(CHECKOUT))


def lines_of(page: Path, languages: str = "console|shell|bash|sh") -> list[str]:
    """The command lines of the page's code blocks, with continued lines joined."""
    blocks = re.findall(rf"^```({languages})\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    lines = []
    for language, block in blocks:
        for line in block.replace("\\\n", " ").splitlines():
            if language == "console" and not line.startswith("$ "):
                continue  # output of the command
            lines.append(line.removeprefix("$ "))
    return lines


def indented(page: Path) -> list[str]:
    """The command lines in indented blocks and comments of a page."""
    lines = page.read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    starts = re.compile(r"(?:    |#   )(?:[A-Z_]+=\S+ )*(?:\S*/)?(?:imagestream|docker-compose run) ")
    return [line.lstrip("# ") for line in lines if starts.match(line)]


def calls(line: str) -> Iterator[list[str]]:
    """The arguments of each `imagestream …` in a shell line."""
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
        assert words[0] in command.commands, f"no such command: {words[0]}"
        command, names, words = command.commands[words[0]], [*names, words[0]], words[1:]
    return tuple(names), command, words


COMMAND_LINES = [
    pytest.param(words, id=f"{page.stem}: {' '.join(words)}"[:100])
    for page in [*PAGES, *OTHERS]
    for line in [*(lines_of(page) if page.suffix == ".md" else []), *indented(page)]
    for words in calls(line)
]


@pytest.mark.parametrize("words", COMMAND_LINES)
def test_documented_command_line_is_valid(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    names, command, arguments = leaf(words)
    if not names:  # options of `imagestream` itself
        assert set(arguments) <= {option for param in command.params for option in param.opts} | {"-h", "--help"}
    elif "--help" not in arguments:
        # Raises for invalid arguments, and warns of a deprecated spelling.
        command.make_context(names[-1], arguments, parent=Context(ROOT, info_name="imagestream"))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_page_that_runs_imagestream_puts_it_on_the_path(page: Path) -> None:
    called = any(re.match(r"([A-Z_]+=\S+ )*imagestream ", line.lstrip()) for line in [*lines_of(page), *indented(page)])
    text = page.read_text(encoding="utf-8")
    assert not called or "source .venv/bin/activate" in text or 'export PATH="$PWD/.venv/bin:$PATH"' in text


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_inline_commands_and_their_options_exist(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for span in re.findall(r"`imagestream (?!\[|<)([^`]+)`", text):
        if "|" in span:
            continue  # several commands at once
        words = [word for word in span.split() if word.isascii() and not word.isupper()]  # without placeholders
        _, command, arguments = leaf(words)
        known = {option for param in command.params for option in (*param.opts, *param.secondary_opts)} | {"--help"}
        assert {word.split("=")[0] for word in arguments if word.startswith("--")} <= known, span


def executed(words: list[str]) -> bool:
    """Whether a command line terminates and needs neither Kafka, Spark, a training run nor a network."""
    names, _, _ = leaf(words)
    excluded = {"--at", "--broker", "--every", "--follow", "--watch"}  # --at requires an older home
    return (
        (names in EXECUTED or names[:1] == ("models",) or (names == ("replay",) and "--dry-run" in words))
        and not excluded.intersection(words)
        and not any("://" in word for word in words)
        and "efficientnet_lite0" not in words  # takes ten seconds; imported by tests/models/test_real_data.py
    )


LINES_IN_ORDER = {
    page: found
    for page in PAGES
    if name_of(page) not in {"README.md", "docs/tutorial.md"}  # run by test_readme.py and test_tutorial.py
    and (
        found := [
            line for line in lines_of(page) if (found_calls := [*calls(line)]) and all(map(executed, found_calls))
        ]
    )
}


@pytest.fixture(scope="module")
def workspace(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with the files named by the pages, and a home with three versions and two batches."""
    folder = tmp_path_factory.mktemp("docs")
    home = folder / ".imagestream"
    shutil.copytree(trained, home, symlinks=True)
    registry = open_registry(home)
    for _ in range(2):
        registry.register(partial(registry.fetch, 1))
    registry.promote(2, alias=CHALLENGER, by="test", why="test")
    for batch in range(2):
        commit_batch(Settings(home=home), batch, {0: (4 * batch, 4 * batch + 4)}, bad={4 * batch + 3})
    write_images(folder / "photos", digit_images(3))
    Image.new("RGB", (40, 30)).save(folder / "photo.jpg")
    (folder / "corrections.csv").write_text("image_id,label\n0-0,dog\n")
    (folder / "imagenet.txt").write_text("\n".join(f"class {n}" for n in range(1000)))
    for name in ("resnet18.onnx", "net.onnx"):
        graphs.save(graphs.classifier(n_classes=1000), folder / name)
    return folder


def test_more_than_50_documented_commands_are_executed() -> None:
    assert sum(map(len, LINES_IN_ORDER.values())) > 50


@pytest.mark.parametrize("page", LINES_IN_ORDER, ids=name_of)
def test_commands_of_a_page_run_in_order(
    page: Path, workspace: Path, exports: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("IMAGESTREAM_")]:
        monkeypatch.delenv(name)
    for name, value in environment_of(Settings(backbones=exports)).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    shutil.copytree(workspace, tmp_path, symlinks=True, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    for line in LINES_IN_ORDER[page]:
        here = re.sub(r"--id [0-9a-f]+", "--id 0-1", line).replace("/srv/", f"{tmp_path}/srv/")
        words = shlex.split(here, comments=True)
        if Path(words[0]).name == "imagestream" and not set("<|") & set(words):
            code, _, errors = command_here(*words[1:])
        else:  # a pipe or a redirection
            shell = subprocess.run(["/bin/bash", "-c", here], capture_output=True, text=True, check=False, timeout=300)
            code, errors = shell.returncode, shell.stderr
        assert code == 0, f"{line}: {errors}"


GUARANTEES = re.findall(r"^\|[^|]+\| `([^`]+)`", (CHECKOUT / "docs" / "promises.md").read_text("utf-8"), re.MULTILINE)


def test_commands_that_verify_guarantees_exist() -> None:
    targets = re.findall(r"^([a-z-]+):.*## ", (CHECKOUT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(GUARANTEES) > 80
    for command in GUARANTEES:
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
                pytest.fail(f"expected make, python or imagestream: {command}")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_link_targets_exist(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{target} does not exist"
        if anchor:
            heads = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}, target


def messages() -> Iterator[str]:
    """The strings in the code, with … for interpolated values."""
    for package in ("producer", "streaming", "models"):
        for module in (CHECKOUT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
                    yield "".join(map(str, parts))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value


def test_explained_messages_exist_in_the_code() -> None:
    page = (CHECKOUT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    tables = re.findall(r"^\| message \|.*\n\|---.*\n((?:\|.*\n)+)", page, re.MULTILINE)
    cells = [row.split("|")[1] for table in tables for row in table.splitlines()]
    fragments = {
        part.strip(" ,?'…") for cell in cells for text in re.findall(r"`([^`]+)`", cell) for part in text.split("…")
    }
    known = list(messages())
    assert len(tables) >= 4
    assert not {part for part in fragments if len(part) > 3 and not any(part in text for text in known)}


def test_reference_is_up_to_date() -> None:
    file = CHECKOUT / "docs" / "reference.md"
    assert file.read_text(encoding="utf-8") == reference(), (
        "out of date: run .venv/bin/python -m streaming.cli.reference > docs/reference.md"
    )
