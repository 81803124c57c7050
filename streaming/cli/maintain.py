"""`imagestream maintain`: few files, a short log, no leftovers."""

import threading
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from streaming.cli.app import JsonOption, app, settings_of, write_json
from streaming.cli.console import err, out

if TYPE_CHECKING:
    from streaming.jobs.maintain import MaintenanceReport


@app.command()
def maintain(
    context: typer.Context,
    every_minutes: Annotated[
        float | None, typer.Option("--every", min=0.01, metavar="MINUTES", help="Again and again, until Ctrl-C.")
    ] = None,
    retention_hours: Annotated[
        int,
        typer.Option(min=0, help="Hours that unused files stay; minimum 24."),
    ] = 168,
    json_file: JsonOption = None,
) -> None:
    """Compact and vacuum the tables, beside a running stream or without one.

    Finishes batches that a stream decided and left unfinished, merges small files, writes checkpoints of the tables'
    logs, and removes files that no version within the retention needs, and old decisions. Neither the stream nor a
    query notices.

    Example: imagestream maintain --every 10
    """
    from streaming.jobs.maintain import maintain as run

    settings = settings_of(context)
    try:
        while True:
            report = run(settings, retention_hours=retention_hours)
            _show(report)
            write_json(json_file, asdict(report))
            if every_minutes is None:
                return
            threading.Event().wait(every_minutes * 60)
    except KeyboardInterrupt:
        if every_minutes is None:
            raise


def _show(report: "MaintenanceReport") -> None:
    from rich.filesize import decimal

    for table in report.tables:
        out.print(
            f"{table.name}: {table.files_before:,} → {table.files_after:,} files, {decimal(table.bytes_after)}, "
            f"{table.vacuumed:,} unused files removed (older than {table.retention_hours} h)",
        )
        if table.skipped:
            err.print(f"{table.name} is left to the next run: {table.skipped}", style="yellow")
    out.print(f"{report.decisions_removed:,} decisions removed, {report.seconds:.1f} s")
