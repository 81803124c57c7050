"""Hostile text in terminals, spreadsheets and plots, and permissions of secrets and written files."""

import logging
import os
from pathlib import Path

import pyarrow as pa
import pytest
from matplotlib.figure import Figure

from streaming.cli import commands  # noqa: F401  registers every command
from streaming.cli.app import run, write_json
from streaming.cli.output_formats import Format, write_rows
from streaming.errors import ServiceError
from streaming.gateway.access import read_keys
from streaming.reports.plots import png
from streaming.settings import Settings
from streaming.storage.tables import LABELS, Table

ESCAPES = "\x1b]0;owned\x07\x1b[2J\u202e\r"


def written(value: object, format_: Format, *, spreadsheet: bool = False, capsys: pytest.CaptureFixture[str]) -> str:
    table = pa.table({"x": [value]})
    write_rows(table.to_reader(), format_, None, spreadsheet=spreadsheet)
    return capsys.readouterr().out


def test_error_contains_no_control_characters(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        run(["--home", str(tmp_path), "publish", f"no such {ESCAPES} file"])
    error = capsys.readouterr().err
    assert "no such" in error
    assert not set(error.rstrip("\n")) & set(ESCAPES) - set("]0;owned[2J ")


def test_table_contains_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    shown = written(ESCAPES, Format.TABLE, capsys=capsys)
    assert not set(shown) & {"\x1b", "\x07", "\u202e", "\r"}


@pytest.mark.parametrize("formula", ["=1+1", "+1", "-1+2", "@SUM(A1)", "\t=1", "\r=1", "＝1"])
def test_formula_is_quoted_with_the_spreadsheet_option(formula: str, capsys: pytest.CaptureFixture[str]) -> None:
    plain = written(formula, Format.CSV, capsys=capsys)
    quoted = written(formula, Format.CSV, spreadsheet=True, capsys=capsys)
    assert "'" not in plain
    assert quoted.partition("\n")[2].lstrip('"').startswith("'" + formula[0])


def test_numbers_and_other_text_are_not_quoted(capsys: pytest.CaptureFixture[str]) -> None:
    for value in (-1, -0.5, "cat", "a=b"):
        assert written(value, Format.CSV, spreadsheet=True, capsys=capsys) == f"x\n{value}\n"


@pytest.mark.parametrize("name", ["$x$", r"$\frac{$", "a$", "$^$"])
def test_class_name_in_a_plot_is_not_parsed_as_math(name: str) -> None:
    def draw() -> Figure:
        figure = Figure()
        figure.subplots().set_title(name)
        return figure

    assert png(draw).startswith(b"\x89PNG")


def test_world_writable_secret_is_refused_and_readable_one_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "key"
    file.write_text("k" * 32)
    file.chmod(0o646)
    with pytest.raises(ServiceError, match=r"got mode 0646: chmod 600"):
        read_keys(file)
    file.chmod(0o644)
    with caplog.at_level(logging.WARNING):
        assert read_keys(file) == ("k" * 32,)
    assert "every user may read it" in caplog.text
    caplog.clear()
    file.chmod(0o600)
    assert read_keys(file) == ("k" * 32,)
    assert not caplog.text


def test_written_files_respect_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        settings = Settings(home=tmp_path / "home")
        rows = pa.Table.from_pylist([{"image_id": "a", "label": "b"}], schema=LABELS)
        Table(settings.place.tables, "labels").append(rows, "test", 1)
        settings.place.store.create("streams/x.json", b"{}")
        write_json(tmp_path / "home" / "summary.json", {})
    finally:
        os.umask(before)
    written = [path for path in (tmp_path / "home").rglob("*") if path.is_file()]
    assert len(written) >= 4
    assert not [path for path in written if path.stat().st_mode & 0o077]
