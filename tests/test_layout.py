"""Rules for all modules and commands: imports, access to the environment, docstrings and help."""

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from importlinter.cli import EXIT_STATUS_SUCCESS, lint_imports
from typer.main import get_command

from streaming.cli import commands  # noqa: F401  registers every command
from streaming.cli.app import app, run

CHECKOUT = Path(__file__).parent.parent
MODULES = sorted(path for package in ("producer", "streaming", "models") for path in (CHECKOUT / package).rglob("*.py"))

# Modules that may access the environment, and the function that does (None: any).
ENVIRONMENT = {
    "streaming/platform/java.py": "_candidates",  # JAVA_HOME, as every Java tool
    "streaming/jobs/demo.py": "_environment",  # processes of the demo use its broker
    "streaming/distributed/network.py": "quiet_tensorflow",  # TensorFlow has no other interface
    "models/sandbox.py": "serve_sandboxed",  # a separate process, before it imports TensorFlow
    "streaming/settings.py": None,
    "streaming/storage/bucket_store.py": None,  # credentials and endpoints of buckets, as the tools of the providers
    "streaming/user_cache.py": "_cache",  # XDG_CACHE_HOME
    "streaming/environment.py": None,  # removes variables
    "models/convert.py": None,  # a separate process, before it imports TensorFlow
}


def name_of(path: Path) -> str:
    return str(path.relative_to(CHECKOUT))


def leaves(group: Any, *names: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(names, command) of every command, including those of groups."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from leaves(command, *names, name)
        else:
            yield (*names, name), command


COMMANDS = dict(leaves(get_command(app)))


def test_import_rules_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    # Its configuration would disable all existing loggers of this process.
    monkeypatch.setattr("importlinter.cli._configure_logging", lambda _: None)
    assert lint_imports(config_filename=str(CHECKOUT / "pyproject.toml"), no_cache=True) == EXIT_STATUS_SUCCESS


def test_environment_is_accessed_only_in_listed_modules() -> None:
    trees = {name_of(module): ast.parse(module.read_text(encoding="utf-8")) for module in MODULES}
    found = {name: set(environment_uses(tree, "<module>")) for name, tree in trees.items()}
    anywhere = {name for name, function in ENVIRONMENT.items() if function is None}
    touched = {name: functions for name, functions in found.items() if functions and name not in anywhere}
    assert touched == {name: {function} for name, function in ENVIRONMENT.items() if function is not None}
    derived = {
        name
        for name, tree in trees.items()
        if any(isinstance(node, ast.Name) and node.id == "BaseSettings" for node in ast.walk(tree))
    }
    assert derived == {"streaming/settings.py"}


def environment_uses(tree: ast.AST, function: str) -> Iterator[str]:
    """The names of the functions that access the environment, however os.environ, os.getenv etc. are imported."""
    for node in ast.iter_child_nodes(tree):
        inner = node.name if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else function
        name = node.attr if isinstance(node, ast.Attribute) else node.name if isinstance(node, ast.alias) else ""
        if name in {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv", "expandvars"}:
            yield inner
        yield from environment_uses(node, inner)


def test_every_access_to_the_environment_is_detected() -> None:
    accesses = "import os\nos.environ['A']\nfrom os import getenv as g\ndef f():\n    os.putenv('A', '')\n"
    assert list(environment_uses(ast.parse(accesses), "<module>")) == ["<module>", "<module>", "f"]


def test_every_module_has_a_docstring() -> None:
    undocumented = [
        name_of(module) for module in MODULES if not ast.get_docstring(ast.parse(module.read_text("utf-8")))
    ]
    assert not undocumented


def test_core_commands_exist() -> None:
    single = "doctor demo publish stream train retrain query predictions setup"
    grouped = {"broker": "start stop status logs", "models": "list show promote rollback verify"}
    names = {(name,) for name in single.split()}
    names |= {(group, name) for group, members in grouped.items() for name in members.split()}
    assert names <= set(COMMANDS)


@pytest.mark.parametrize("names", COMMANDS, ids=" ".join)
def test_help_of_a_command_has_a_valid_example(names: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run([*names, "--help"])
    assert ended.value.code == 0
    assert f"Usage: imagestream {' '.join(names)}" in capsys.readouterr().out

    text = COMMANDS[names].help
    example = re.search(r"^Example: (.+)$", text, re.MULTILINE)
    assert example, f"the help of {names} has no example: {text}"
    for line in example[1].split(", or: "):
        words = shlex.split(re.sub(r" \([^)\"]*\)$", "", line.strip()))
        assert tuple(words[: 1 + len(names)]) == ("imagestream", *names)
        COMMANDS[names].make_context(names[-1], words[1 + len(names) :])  # raises for invalid arguments
