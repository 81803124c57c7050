"""`imagestream query` and `imagestream predictions`: rows of the Delta tables as a table, CSV, JSON or Parquet."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from streaming.cli.app import JsonOption, app, err, settings_of, write_json
from streaming.cli.row_formats import Format, write_rows
from streaming.errors import ServiceError

if TYPE_CHECKING:
    import pyarrow as pa

MAX_SQL_CHARS = 1_000_000  # from standard input
PREDICTIONS_COLUMNS = "SELECT scored_at, source, label, confidence, label_true, model_version, image_id"

Ask = Callable[[], AbstractContextManager["pa.RecordBatchReader"]]

FormatOption = Annotated[Format, typer.Option("--format", "-f", help="How to write the rows.")]
OutputOption = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write to a file; Parquet needs one.")
]
SpreadsheetOption = Annotated[
    bool, typer.Option("--spreadsheet", help="In CSV, keep text from being a formula: an apostrophe goes before it.")
]
TimeoutOption = Annotated[float, typer.Option("--timeout", min=0.1, metavar="SECONDS", help="Time limit.")]
AtOption = Annotated[
    str | None, typer.Option("--at", metavar="TIME", help="The tables as they were then, such as 2026-11-16T09:30.")
]
WatchOption = Annotated[
    float | None,
    typer.Option(
        "--watch", min=0.1, metavar="SECONDS", help="Ask again so often, and show what changed, until Ctrl-C."
    ),
]


@app.command()
def query(
    context: typer.Context,
    sql: Annotated[str | None, typer.Argument(metavar="SQL", help="One SELECT over the tables.")] = None,
    at: AtOption = None,
    watch: WatchOption = None,
    format_: FormatOption = Format.TABLE,
    output: OutputOption = None,
    spreadsheet: SpreadsheetOption = False,
    timeout_s: TimeoutOption = 60.0,
    json: JsonOption = None,
) -> None:
    """Query the Delta tables with SQL, read-only: predictions, quarantine, batches, features, labels.

    `DESCRIBE predictions` lists the columns of one, `SHOW TABLES` the tables that are there. Without SQL it is read
    from standard input; on a terminal, a shell asks for it, with history and completion.

    Example: imagestream query "SELECT label, count(*) FROM predictions GROUP BY label ORDER BY label"
    """
    from streaming.query_process import open_guarded_query

    ask = partial(open_guarded_query, settings_of(context), timeout_s=timeout_s, at=_moment(at))
    if sql is None and sys.stdin.isatty() and sys.stdout.isatty():
        from streaming.cli.query_shell import run_shell

        run_shell(ask, settings_of(context).work_dir / "query_history")
        return
    _answer(partial(ask, _from_stdin() if sql is None else sql), format_, output, watch, json, spreadsheet=spreadsheet)


@app.command()
def predictions(
    context: typer.Context,
    limit: Annotated[int, typer.Option(min=1, help="At most so many rows.")] = 20,
    label: Annotated[str | None, typer.Option(help="Only what was predicted to be this class.")] = None,
    below: Annotated[
        float | None, typer.Option(metavar="CONF", help="Only below this confidence, the least sure first.")
    ] = None,
    model: Annotated[int | None, typer.Option(min=1, help="Only by this model version.")] = None,
    since: Annotated[str | None, typer.Option(metavar="TIME", help="Only what was scored from then on.")] = None,
    at: AtOption = None,
    watch: WatchOption = None,
    format_: FormatOption = Format.TABLE,
    output: OutputOption = None,
    spreadsheet: SpreadsheetOption = False,
    timeout_s: TimeoutOption = 60.0,
    json: JsonOption = None,
) -> None:
    """Show the latest predictions, of one class, of low confidence, or of one model version.

    Example: imagestream predictions --label 7 --below 0.6
    """
    from streaming.answers import PREDICTIONS, PREDICTIONS_ORDER
    from streaming.query import open_query

    values = {"limit": limit, "label": label, "below": below, "version": model, "since": _moment(since)}
    sql = PREDICTIONS_COLUMNS + PREDICTIONS + PREDICTIONS_ORDER
    ask = partial(open_query, settings_of(context), sql, parameters=values, timeout_s=timeout_s, at=_moment(at))
    _answer(ask, format_, output, watch, json, spreadsheet=spreadsheet)


def _moment(text: str | None) -> datetime | None:
    from streaming.answers import moment

    return None if text is None else moment(text)


def _from_stdin() -> str:
    sql = sys.stdin.read(MAX_SQL_CHARS + 1)
    if len(sql) > MAX_SQL_CHARS:
        raise ServiceError(f"the SQL on standard input is longer than {MAX_SQL_CHARS:,} characters")
    if not sql.strip():
        raise ServiceError("no SQL: expected a SELECT as argument or on standard input")
    return sql


def check_format(format_: Format, output: Path | None, *, spreadsheet: bool) -> None:
    """Check that options that say how rows are written go together.

    Raises:
        ServiceError: they do not.
    """
    if spreadsheet and format_ is not Format.CSV:
        raise ServiceError(f"--spreadsheet is for --format csv, got --format {format_}")
    if format_ is Format.PARQUET and output is None:
        raise ServiceError("--format parquet is binary: expected a file, give one with --output FILE")


def _answer(
    ask: Ask,
    format_: Format,
    output: Path | None,
    watch_s: float | None,
    summary: Path | None,
    *,
    spreadsheet: bool,
) -> None:
    check_format(format_, output, spreadsheet=spreadsheet)
    if watch_s is not None:
        if output is not None:
            raise ServiceError("--watch shows rows as they change: expected no --output FILE with it")
        from streaming.cli.query_watch import watch

        with pipe_may_close():
            write_json(summary, {"answers": watch(ask, watch_s, format_)})
        return
    with pipe_may_close():
        with ask() as reader:
            columns = reader.schema.names
            rows = write_rows(reader, format_, output, spreadsheet=spreadsheet)
            sys.stdout.flush()
        if output is not None:
            err.print(f"{rows:,} rows in {output}", highlight=False)
        write_json(summary, {"rows": rows, "columns": columns, "format": format_.value, "output": output})


@contextmanager
def pipe_may_close() -> Iterator[None]:
    """End quietly when the reader of standard output has read enough, as `| head` does."""
    try:
        yield
    except BrokenPipeError:
        # What is still buffered must not fail again when Python closes the stream.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
