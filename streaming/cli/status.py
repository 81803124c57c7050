"""`imagestream status`: health, lag and throughput of a stream."""

from contextlib import nullcontext
from pathlib import Path
from time import time
from typing import TYPE_CHECKING, Annotated

import typer

from streaming.cli.app import EXIT_FAILED, JsonOption, app, checking, settings_of, write_json
from streaming.cli.command_line import OPERATION
from streaming.cli.console import new_table, out, styled
from streaming.cli.output import WATCH_S, EveryOption, FormatOption, OutputOption, list_rows
from streaming.cli.output_formats import Format
from streaming.settings import with_options
from streaming.signals import until_stopped
from streaming.wording import counted

if TYPE_CHECKING:
    from rich.table import Table

    from streaming.pipeline.status import Status


@app.command(panel=OPERATION, settings=("topic", "bootstrap_servers"))
def status(
    context: typer.Context,
    watch: Annotated[bool, typer.Option("--watch", help="Update the status repeatedly, until Ctrl-C.")] = False,
    every: EveryOption = WATCH_S,
    stream: Annotated[
        str | None, typer.Option("--stream", metavar="NAME", help="Name of the stream; default: the topic's name.")
    ] = None,
    format_: FormatOption = Format.TABLE,
    output: OutputOption = None,
    json_file: JsonOption = None,
) -> None:
    """Show the broker, the stream, its lag, rate, models and quarantine; exit 1 if unhealthy, 3 if unknown.

    The service is healthy if the broker answers, a stream of the topic runs on this machine and has sent a recent
    heartbeat, and it uses the champion. Lag does not affect health.

    Example: imagestream status --watch
    """
    from rich.live import Live

    from streaming.pipeline.status import read_status

    settings = with_options(settings_of(context), topic=stream)
    with checking():
        found = read_status(settings)
    if watch:
        # On a terminal the table is redrawn in place.
        with until_stopped() as stop, Live(console=out) if out.is_terminal else nullcontext() as live:
            while True:
                live.update(_table(found), refresh=True) if live else _show(found, format_, output)
                stop.wait(every)
                with checking():
                    found = read_status(settings)
    else:
        _show(found, format_, output)
    write_json(json_file, found.as_json())
    if not found.healthy:
        raise typer.Exit(EXIT_FAILED)


COLUMNS = {"item": str, "value": str}


def _show(found: "Status", format_: Format, output: Path | None) -> None:
    if format_ is Format.TABLE and output is None:
        out.print(_table(found))
    else:
        list_rows([{"item": name, "value": text} for name, text, _ in _lines(found)], COLUMNS, format_, output)


def _table(found: "Status") -> "Table":
    table = new_table("", "", head=False)
    for name, text, style in _lines(found):
        table.add_row(styled(name), styled(text, style))
    return table


def _lines(found: "Status") -> list[tuple[str, str, str]]:
    """Return (name, text, style) of each line."""
    lines: list[tuple[str, str, str]] = []

    def line(name: str, text: str, style: str = "") -> None:
        lines.append((name, text, style))

    health = "healthy" if found.healthy else "not healthy: " + "; ".join(found.reasons)
    line("health", health, "green" if found.healthy else "red")
    line("broker", f"{found.broker or 'none'}, {'up' if found.broker_up else 'down'}")
    if found.streaming and found.stream:
        line("stream", f"process {found.stream.pid}" + (f", {found.stream.url}/metrics" if found.stream.url else ""))
    else:
        line("stream", "not running")
    for one in found.partitions:
        lag = "unknown" if one.lag is None else f"{one.lag:,}"
        held = f", {one.held:,} held by an open transaction" if one.held else ""
        line(f"{one.topic}/{one.partition}", f"committed {_n(one.committed)}, end {_n(one.end)}, lag {lag}{held}")
    for topic, count in found.near_retention.items():
        text = f"{topic}: {counted(count, 'unprocessed message')} past half of Kafka's retention time"
        line("retention", text, "yellow")
    if found.last_batch:
        last = found.last_batch
        line(
            "last batch",
            f"{last.batch_id} ({counted(last.input_rows, 'image')}, version {last.model_version}), "
            f"{last.age_s:,.0f} s ago",
        )
    if found.stream and (answers := found.stream.answers):
        newest = f"batch {answers.batch}" if answers.batch else "none yet"
        if answers.at:  # else an earlier process committed it
            newest += f" ({answers.messages:,} answers), {time() - answers.at:,.0f} s ago"
        line("answers", f"topic {answers.topic}: {newest}, backlog {answers.backlog:,}")
    if found.images_per_second is not None:
        line("rate", f"{found.images_per_second:,.0f} images/s over the last batches")
    line("models", ", ".join(f"{alias} {version or 'none'}" for alias, version in found.aliases.items()))
    if found.challenger_error:
        line("challenger", f"does not score: {found.challenger_error}", "yellow")
    quarantined = ", ".join(f"{reason} {count:,}" for reason, count in found.quarantined.items())
    line("quarantine", quarantined or "empty")
    return lines


def _n(number: int | None) -> str:
    return "-" if number is None else f"{number:,}"
