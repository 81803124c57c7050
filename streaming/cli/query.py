"""`imagestream query` and `imagestream predictions`: query the Delta tables."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from streaming.cli.app import JsonOption, app, settings_of, write_json
from streaming.cli.command_line import IMAGES, Deprecated, seconds
from streaming.cli.console import err
from streaming.cli.output import WATCH_S, EveryOption, FormatOption, OutputOption
from streaming.cli.output_formats import STDOUT, Format, check_format, write_rows
from streaming.errors import UsageError
from streaming.wording import counted

if TYPE_CHECKING:
    import pyarrow as pa

MAX_SQL_CHARS = 1_000_000  # from standard input
PREDICTIONS_COLUMNS = "SELECT scored_at, source, label, confidence, label_true, model_version, image_id"

RunQuery = Callable[[], AbstractContextManager["pa.RecordBatchReader"]]

SpreadsheetOption = Annotated[
    bool,
    typer.Option("--spreadsheet", help="With --format csv, prefix text that looks like a formula with an apostrophe."),
]
TimeoutOption = Annotated[
    Any, typer.Option("--timeout", parser=seconds, metavar="TIME", help="Time limit of the query, e.g. 30s.")
]
AtOption = Annotated[
    str | None,
    typer.Option(
        "--at", metavar="TIME", help="Time of the table versions to query, e.g. 2026-11-16T09:30; default: now."
    ),
]
WatchOption = Annotated[bool, typer.Option("--watch", help="Repeat the query and show each new result, until Ctrl-C.")]
DEPRECATED = (Deprecated("-f", "--format {}"), Deprecated("--watch", "--watch --every {}s", only=r"[0-9]*\.?[0-9]+"))


@app.command(panel=IMAGES, deprecated=DEPRECATED)
def query(
    context: typer.Context,
    sql: Annotated[str | None, typer.Argument(metavar="SQL", help="SELECT statement over the tables.")] = None,
    at: AtOption = None,
    watch: WatchOption = False,
    every: EveryOption = WATCH_S,
    format_: FormatOption = Format.TABLE,
    output: OutputOption = None,
    spreadsheet: SpreadsheetOption = False,
    timeout_s: TimeoutOption = 60.0,
    json: JsonOption = None,
) -> None:
    """Query the Delta tables with read-only SQL: predictions, quarantine, batches, features, labels.

    `SHOW TABLES` lists the tables, `DESCRIBE predictions` the columns of one. Without SQL, the statement is read from
    standard input; on a terminal, an interactive shell with history and completion starts.

    Example: imagestream query "SELECT label, count(*) FROM predictions GROUP BY label ORDER BY label"
    """
    from streaming.query_process import open_guarded_query

    start = partial(open_guarded_query, settings_of(context), at=_time_of(at))
    ask = partial(start, timeout_s=timeout_s)
    if sql is None and sys.stdin.isatty() and sys.stdout.isatty():
        from streaming.cli.query_shell import columns_of, run_shell

        # Not within the user's limit, which a busy machine may exceed before the first prompt.
        run_shell(ask, columns_of(start), settings_of(context).work_dir / "query_history")
        return
    _answer(
        partial(ask, _from_stdin() if sql is None else sql),
        format_,
        output,
        every if watch else None,
        json,
        spreadsheet=spreadsheet,
    )


@app.command(panel=IMAGES, deprecated=DEPRECATED)
def predictions(
    context: typer.Context,
    limit: Annotated[int, typer.Option(min=1, help="Maximum number of rows.")] = 20,
    label: Annotated[str | None, typer.Option(help="Predicted class to select; default: all.")] = None,
    below: Annotated[
        float | None,
        typer.Option(metavar="CONF", help="Upper limit of the confidence, from 0 to 1; lowest confidence first."),
    ] = None,
    model: Annotated[int | None, typer.Option(min=1, help="Model version to select; default: all.")] = None,
    since: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Time from which predictions are selected, e.g. 2026-11-16T09:30."),
    ] = None,
    at: AtOption = None,
    watch: WatchOption = False,
    every: EveryOption = WATCH_S,
    follow: Annotated[
        bool, typer.Option("--follow", help="Write each new prediction as a JSON line, until Ctrl-C.")
    ] = False,
    after: Annotated[
        str | None,
        typer.Option(
            "--after",
            metavar="POSITION",
            help="Position after which --follow starts: latest, earliest, or the position of an earlier line; "
            "default: latest.",
        ),
    ] = None,
    format_: FormatOption = Format.TABLE,
    output: OutputOption = None,
    spreadsheet: SpreadsheetOption = False,
    timeout_s: TimeoutOption = 60.0,
    json: JsonOption = None,
) -> None:
    """Show or follow the latest predictions, optionally of one class, model version or low confidence.

    --follow reads the answers topic if there is one, else new versions of the table. Each line contains the `position`
    from which another call can continue. It ends after --limit lines if that option is given.

    Example: imagestream predictions --label 7 --below 0.6
    """
    if follow:
        from streaming.cli.follow import follow_lines

        sources = {name: context.get_parameter_source(name) for name in context.params}
        given = {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}
        if others := given & {"since", "at", "watch", "every", "format_", "output", "spreadsheet", "timeout_s"}:
            raise UsageError(f"--follow writes JSON lines as they arrive: omit --{min(others).strip('_')}")
        with pipe_may_close():
            summary = follow_lines(
                settings_of(context),
                after or "latest",
                limit if "limit" in given else None,
                lambda row: (
                    (label is None or row["label"] == label)
                    and (below is None or row["confidence"] < below)
                    and (model is None or row["model_version"] == model)
                ),
            )
            write_json(json, summary)
        return
    if after is not None:
        raise UsageError("--after is an option of --follow: expected both, got --after alone")
    from streaming.answers import PREDICTIONS, PREDICTIONS_ORDER
    from streaming.query import open_query

    values = {"limit": limit, "label": label, "below": below, "version": model, "since": _time_of(since)}
    sql = PREDICTIONS_COLUMNS + PREDICTIONS + PREDICTIONS_ORDER
    ask = partial(open_query, settings_of(context), sql, parameters=values, timeout_s=timeout_s, at=_time_of(at))
    _answer(ask, format_, output, every if watch else None, json, spreadsheet=spreadsheet)


def _time_of(text: str | None) -> datetime | None:
    from streaming.answers import parse_time

    return None if text is None else parse_time(text)


def _from_stdin() -> str:
    sql = sys.stdin.read(MAX_SQL_CHARS + 1)
    if len(sql) > MAX_SQL_CHARS:
        raise UsageError(f"the SQL on standard input is longer than {MAX_SQL_CHARS:,} characters")
    if not sql.strip():
        raise UsageError("no SQL: expected a SELECT statement as argument or on standard input")
    return sql


def _answer(
    ask: RunQuery,
    format_: Format,
    output: Path | None,
    watch_s: float | None,
    summary: Path | None,
    *,
    spreadsheet: bool,
) -> None:
    if watch_s is not None and format_ is Format.PARQUET:
        raise UsageError("--watch shows rows as they change: expected a --format other than parquet")
    check_format(format_, output, spreadsheet=spreadsheet)
    if watch_s is not None:
        if output is not None:
            raise UsageError("--watch shows rows as they change: expected no --output FILE")
        from streaming.cli.query_watch import watch

        with pipe_may_close():
            write_json(summary, {"answers": watch(ask, watch_s, format_)})
        return
    with pipe_may_close():
        with ask() as reader:
            columns = reader.schema.names
            rows = write_rows(reader, format_, output, spreadsheet=spreadsheet)
            sys.stdout.flush()
        if output not in (None, STDOUT):
            err.print(f"{counted(rows, 'row')} in {output}")
        write_json(summary, {"rows": rows, "columns": columns, "format": format_.value, "output": output})


@contextmanager
def pipe_may_close() -> Iterator[None]:
    """End quietly when the reader of standard output closes it, as `| head` does."""
    try:
        yield
    except BrokenPipeError:
        # Buffered output must not fail again when Python closes the stream.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
