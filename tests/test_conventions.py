"""Conventions that every command keeps, checked over all commands that there are; docs/conventions.md has the table."""

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from typer.main import get_command

from streaming.cli import commands  # noqa: F401  registers every command
from streaming.cli.app import app
from streaming.cli.row_formats import Format
from streaming.settings import Settings
from tests.conftest import command_here
from tests.streaming.history import commit_batch

CLI = Path(__file__).parent.parent / "streaming" / "cli"


def all_commands(path: str = "", command: Any = None) -> Iterator[tuple[str, Any]]:
    """(name, command) of every command that people see, groups left out: `models list`, …"""
    command = command or get_command(app)
    if command.hidden:
        return
    members = getattr(command, "commands", None)
    if members is None:
        yield path, command
        return
    for name, member in members.items():
        yield from all_commands(f"{path} {name}".strip(), member)


COMMANDS = dict(all_commands())
LISTING = sorted(name for name, one in COMMANDS.items() if any(param.name == "format_" for param in one.params))


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home with a few predictions and no model."""
    commit_batch(Settings(home=tmp_path / "home"), 0, {0: (0, 4)})
    return tmp_path / "home"


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(home: Path) -> Run:
    return lambda *arguments: command_here("--home", home, *arguments)


@pytest.mark.parametrize("name", [name for name in LISTING if name != "features"])
def test_what_lists_writes_every_format(name: str, run: Run, tmp_path: Path) -> None:
    arguments = [*name.split(), *(["FROM predictions"] if name == "query" else [])]
    as_csv, as_json, as_lines = (run(*arguments, "--format", one)[1] for one in ("csv", "json", "ndjson"))
    rows = json.loads(as_json)
    assert [json.loads(line) for line in as_lines.splitlines()] == rows or name in {"status", "doctor"}
    heads, *lines = csv.reader(io.StringIO(as_csv))
    assert len(lines) == len(rows)
    assert all(list(row) == heads for row in rows)
    run(*arguments, "--format", "parquet", "--output", tmp_path / "rows.parquet")
    assert pq.read_table(tmp_path / "rows.parquet").num_rows == len(rows)
    run(*arguments, "--output", tmp_path / "rows.txt")
    assert re.search(rf"^{len(rows):,} rows?$", (tmp_path / "rows.txt").read_text(encoding="utf-8"), re.MULTILINE)


def test_every_listing_takes_all_formats_and_an_output() -> None:
    assert {"audit", "config show", "doctor", "models list", "predictions", "query", "report", "status"} <= set(LISTING)
    for name in LISTING:
        options = {option for param in COMMANDS[name].params for option in param.opts}
        assert {"--format", "--output", "-o"} <= options, name
    for name in set(LISTING) - {"features"}:
        (param,) = (one for one in COMMANDS[name].params if one.name == "format_")
        assert {*param.type_descriptor.annotation} == {*Format}, name


def test_tables_are_made_in_one_place() -> None:
    """A command that lists in a way of its own would have one format only."""
    apart = {path.name for path in CLI.glob("*.py") if re.search(r"rich\.(table|markup)", path.read_text("utf-8"))}
    assert apart == {"console.py"} | ({"status.py"} if "status.py" in apart else set())


@pytest.mark.parametrize("name", ["models list", "config show", "predictions"])
def test_the_summary_alone_is_on_standard_output_where_json_is_asked_for_there(name: str, run: Run) -> None:
    code, out, err = run(*name.split(), "--json", "-")
    assert (code, bool(json.loads(out))) == (0, True)
    assert "row" in err
    code, out, err = run(*name.split(), "--json", "-", "--format", "csv")
    assert (code, out) == (2, "")
    assert "both go to standard output" in err


def test_a_table_in_a_pipe_has_all_rows_and_whole_cells(run: Run) -> None:
    code, out, _ = run("query", "SELECT range AS n, repeat('x', 200) AS wide FROM range(300)")
    assert (code, out.count("x" * 200), out.splitlines()[-1]) == (0, 300, "300 rows")
