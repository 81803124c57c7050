"""`imagestream status`: is it running, is it healthy, how far behind is it."""

import threading
from contextlib import nullcontext, suppress
from time import time
from typing import TYPE_CHECKING, Annotated

import typer

from streaming.cli.app import EXIT_FAILED, JsonOption, app, out, settings_of, write_json

if TYPE_CHECKING:
    from rich.table import Table

    from streaming.pipeline.status import Status


@app.command()
def status(
    context: typer.Context,
    watch: Annotated[bool, typer.Option("--watch", help="Again every few seconds, until Ctrl-C.")] = False,
    topic: Annotated[
        str | None, typer.Option("--topic", "--stream", help="The topic, or name of the stream; default: images.")
    ] = None,
    bootstrap_servers: Annotated[
        str | None, typer.Option(metavar="HOST:PORT,…", help="Kafka brokers; default: the home's own.")
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Show the broker, the stream, its lag, rate, models and quarantine; exit 1 if it is not healthy.

    Healthy means that the broker answers, that a stream of the topic runs here and gave a sign of life lately, and that
    it takes the champion. Lag is shown, and is no ill health.

    Example: imagestream status --watch
    """
    from rich.live import Live

    from streaming.pipeline.status import read_status

    given = {"bootstrap_servers": bootstrap_servers, "topic": topic}
    settings = settings_of(context).model_copy(update={key: value for key, value in given.items() if value})
    found = read_status(settings)
    if watch:
        # One table that is drawn again on a terminal; elsewhere one after the other.
        with suppress(KeyboardInterrupt), Live(console=out) if out.is_terminal else nullcontext() as live:
            while True:
                live.update(_table(found), refresh=True) if live else out.print(_table(found))
                threading.Event().wait(WATCH_S)
                found = read_status(settings)
    else:
        out.print(_table(found))
    write_json(json_file, found.as_json())
    if not found.healthy:
        raise typer.Exit(EXIT_FAILED)


WATCH_S = 2.0


def _table(found: "Status") -> "Table":
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False)

    def line(name: str, text: str, style: str = "") -> None:
        table.add_row(Text(name), Text(text, style))

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
        text = f"{count:,} messages of {topic} wait for a row, and half of the time is over for which Kafka keeps them"
        line("retention", text, "yellow")
    if found.last_batch:
        last = found.last_batch
        line(
            "last batch",
            f"{last.batch_id} ({last.input_rows:,} images, version {last.model_version}), {last.age_s:,.0f} s ago",
        )
    if found.stream and (answers := found.stream.answers):
        since = f", {time() - answers.at:,.0f} s ago" if answers.at else ""
        out_yet = (
            "none yet" if answers.batch is None else f"batch {answers.batch} ({answers.messages:,} answers){since}"
        )
        line("answers", f"topic {answers.topic}: {out_yet}, backlog {answers.backlog:,}")
    if found.images_per_second is not None:
        line("rate", f"{found.images_per_second:,.0f} images/s over the last batches")
    line("models", ", ".join(f"{alias} {version or 'none'}" for alias, version in found.aliases.items()))
    quarantined = ", ".join(f"{reason} {count:,}" for reason, count in found.quarantined.items())
    line("quarantine", quarantined or "empty")
    return table


def _n(number: int | None) -> str:
    return "-" if number is None else f"{number:,}"
