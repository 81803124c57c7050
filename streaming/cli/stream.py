"""`imagestream stream`: score the topic."""

from typing import TYPE_CHECKING, Annotated

import typer

from streaming.cli.app import JsonOption, app, err, out, settings_of, write_json

if TYPE_CHECKING:
    from streaming.commit import BatchResult


@app.command()
def stream(
    context: typer.Context,
    until_drained: Annotated[
        bool, typer.Option("--until-drained", help="End when every message there is now has been scored.")
    ] = False,
    bootstrap_servers: Annotated[
        str | None, typer.Option(metavar="HOST:PORT,…", help="Kafka brokers; default: the home's own.")
    ] = None,
    topic: Annotated[str | None, typer.Option(help="The topic to read; default: images.")] = None,
    images_per_batch: Annotated[int, typer.Option(min=1, help="At most so many images in a micro-batch.")] = 2_000,
    features: Annotated[bool, typer.Option(help="Store the backbone's features, for retraining.")] = True,
    json_file: JsonOption = None,
) -> None:
    """Score the images of the topic into the Delta tables, exactly once, until stopped with Ctrl-C.

    Example: imagestream stream --until-drained
    """
    from streaming.broker import bootstrap_servers as home_servers
    from streaming.stream import run_stream

    given = {"bootstrap_servers": bootstrap_servers, "topic": topic}
    settings = settings_of(context).model_copy(update={key: value for key, value in given.items() if value})
    servers = home_servers(settings)
    summary = run_stream(
        settings,
        servers,
        until_drained=until_drained,
        images_per_batch=images_per_batch,
        store_features=features,
        on_start=lambda: err.print(f"reading topic {settings.topic} at {servers}", highlight=False, markup=False),
        on_batch=_show_batch,
        on_refused=_show_refused,
    )
    versions = ", ".join(f"version {one}: {n:,}" for one, n in sorted(summary.predicted_by_version.items()))
    out.print(
        f"{summary.input_rows:,} images in {summary.batches} micro-batches: {summary.predicted:,} predicted"
        + (f" ({versions})" if versions else "")
        + f", {sum(summary.quarantined.values()):,} quarantined",
        highlight=False,
    )
    write_json(
        json_file,
        {
            "batches": summary.batches,
            "input": summary.input_rows,
            "predicted": summary.predicted,
            "quarantined": summary.quarantined,
            "predicted_by_version": summary.predicted_by_version,
            "seconds": summary.seconds,
            "batch_seconds": summary.batch_seconds,
        },
    )


def _show_batch(batch: "BatchResult") -> None:
    quarantined = sum(batch.quarantined.values())
    err.print(
        f"batch {batch.batch_id}: {batch.input_rows:,} images, {batch.predicted_rows:,} predicted, "
        f"{quarantined:,} quarantined, version {batch.model_version}, {batch.wall_s:.2f} s, "
        f"{batch.input_rows / max(batch.wall_s, 1e-9):.0f} images/s",
        highlight=False,
    )


def _show_refused(version: int, why: str) -> None:
    err.print(f"version {version} is refused, the old one goes on: {why}", style="yellow", markup=False)
