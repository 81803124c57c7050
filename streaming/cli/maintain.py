"""`imagestream maintain`: compact and vacuum the tables."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from streaming.cli.app import JsonOption, app, settings_of, write_json
from streaming.cli.command_line import OPERATION, Deprecated
from streaming.cli.console import err, out
from streaming.durations import parse_duration
from streaming.signals import until_stopped
from streaming.wording import counted

if TYPE_CHECKING:
    from streaming.jobs.maintain import MaintenanceReport


@app.command(panel=OPERATION, settings=("retention",), deprecated=(Deprecated("--retention-hours", "--retention {}h"),))
def maintain(
    context: typer.Context,
    every: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="Interval between runs, e.g. 10m (a plain number is in minutes); runs until stopped. Default: one "
            "run.",
        ),
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Compact and vacuum the tables, with or without a running stream.

    Completes batches that a stream left unfinished, merges small files, writes checkpoints of the tables' logs, and
    removes old decisions and the files that no version within the retention needs. Streams and queries are not
    affected.

    Example: imagestream maintain --every 10m
    """
    from streaming.jobs.maintain import maintain as run

    settings = settings_of(context)
    every_s = None if every is None else parse_duration(every, plain="m", min_s=0.1)

    def once() -> None:
        report = run(settings, retention_hours=settings.retention_hours)
        _show(report)
        write_json(json_file, asdict(report))

    if every_s is None:
        once()
        return
    with until_stopped() as stop:
        while True:
            once()
            stop.wait(every_s)


def _show(report: "MaintenanceReport") -> None:
    from rich.filesize import decimal

    for table in report.tables:
        out.print(
            f"{table.name}: {table.files_before:,} → {counted(table.files_after, 'file')}, "
            f"{decimal(table.bytes_after)}, {counted(table.vacuumed, 'unused file')} removed "
            f"(older than {table.retention_hours} h)"
        )
        if table.skipped:
            err.print(f"{table.name} is left for the next run: {table.skipped}", style="yellow")
    out.print(f"{report.decisions_removed:,} decisions removed, {report.seconds:.1f} s")
