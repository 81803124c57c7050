"""`imagestream stream`: classify the images of a topic continuously."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from streaming.cli.app import JsonOption, app, settings_of, write_json
from streaming.cli.command_line import IMAGES, SPARK, Deprecated
from streaming.cli.console import err, new_table, out
from streaming.wording import counted

if TYPE_CHECKING:
    from streaming.pipeline.commit import BatchResult
    from streaming.pipeline.profile import Profile


@app.command(
    panel=IMAGES,
    settings=(
        "bootstrap_servers",
        *SPARK,
        "images_per_batch",
        "megabytes_per_batch",
        "schema_registry",
        "answers_topic",
        "answers",
        "answers_format",
        "answers_bootstrap_servers",
        "metrics_host",
        "metrics_port",
        "log_format",
    ),
    deprecated=(Deprecated("--log-json", "--log-format json"),),
)
def stream(
    context: typer.Context,
    until_drained: Annotated[
        bool, typer.Option("--until-drained", help="Stop when all messages present at the start have been scored.")
    ] = False,
    topic: Annotated[
        str | None, typer.Option("--topic", "-t", metavar="NAME,…", help="Topic or topics to read; default: images.")
    ] = None,
    topic_pattern: Annotated[
        str | None,
        typer.Option(
            metavar="REGEX",
            help="Pattern that the full name of a topic must match to be read, including topics created later.",
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option("--stream", metavar="NAME", help="Name of the stream in the home; default: the topic's name."),
    ] = None,
    begin: Annotated[
        str,
        typer.Option(
            "--from",
            metavar="earliest|latest|TIME",
            help="Position at which the first start begins to read; TIME is a message timestamp with its zone, e.g. "
            "2026-11-16T08:00Z.",
        ),
    ] = "earliest",
    payload: Annotated[
        str,
        typer.Option(
            metavar="raw|base64|json:FIELD|avro:FIELD",
            help="Encoding of the image in a message: raw bytes, base64, or a field of a JSON or Avro record.",
        ),
    ] = "raw",
    payload_schema: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="File with the schema of the Avro records, as JSON; default: the schema registry."
        ),
    ] = None,
    features: Annotated[bool, typer.Option(help="Store the backbone's features for retraining.")] = True,
    accept_loss: Annotated[
        bool, typer.Option("--accept-loss", help="Continue even if Kafka deleted messages before they were read.")
    ] = False,
    accept_new_topic: Annotated[
        bool, typer.Option("--accept-new-topic", help="Continue even if the topic was deleted and recreated.")
    ] = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="Report the time per stage for each micro-batch and in total.")
    ] = False,
    json_file: JsonOption = None,
) -> None:
    """Classify the images of a topic and write the predictions to Delta tables, exactly once, until Ctrl-C.

    A later start continues from the committed offsets, regardless of `--from`. Several topics, or a pattern, require
    `--stream`; a home may contain several streams, each with its own topics.

    Example: imagestream stream --until-drained
    """
    from streaming.pipeline.observe import Observer, open_log
    from streaming.pipeline.payload import chosen_payload
    from streaming.pipeline.positions import Accept
    from streaming.pipeline.profile import Profiler
    from streaming.pipeline.stream import StreamEvents, StreamOptions, run_stream
    from streaming.pipeline.subscribe import chosen_begin, chosen_topics
    from streaming.platform.broker import bootstrap_servers as home_servers
    from streaming.settings import with_options

    stream_name, subscription = chosen_topics(settings_of(context), topic, topic_pattern, name)
    settings = with_options(settings_of(context), topic=stream_name)
    servers = home_servers(settings)
    options = StreamOptions(
        until_drained=until_drained,
        images_per_batch=settings.images_per_batch,
        bytes_per_batch=settings.megabytes_per_batch * 1_000_000,
        store_features=features,
        accept=Accept(accept_loss, accept_new_topic),
        payload=chosen_payload(payload, payload_schema, settings.schema_registry),
        subscription=subscription,
        begin=chosen_begin(begin),
    )
    log = open_log(settings.log_format)
    observer = Observer(settings, servers, log=log, metrics_port=settings.metrics_port, host=settings.metrics_host)
    profiler = Profiler() if profile else None

    def on_batch(batch: "BatchResult") -> None:
        observer.on_batch(batch)
        if profiler is not None:
            err.print(profiler.add(batch))

    events = StreamEvents(
        on_start=observer.on_start,
        on_batch=on_batch,
        on_answers=observer.on_answers,
        on_refused=observer.on_refused,
        on_trouble=observer.on_trouble,
        on_notice=observer.on_notice,
        on_idle=observer.on_idle,
    )
    try:
        summary = run_stream(settings, servers, options, events)
    except Exception as error:
        observer.on_failure(str(error))
        raise
    finally:
        observer.close()
    versions = ", ".join(f"version {one}: {n:,}" for one, n in sorted(summary.predicted_by_version.items()))
    out.print(
        f"{counted(summary.input_rows, 'image')} in {counted(summary.batches, 'micro-batch')}: "
        f"{summary.predicted:,} predicted"
        + (f" ({versions})" if versions else "")
        + f", {sum(summary.quarantined.values()):,} quarantined"
    )
    profiled = profiler.total.as_dict() if profiler is not None else None
    if profiler is not None:
        _print_profile(profiler.total)
    write_json(json_file, {"input": summary.input_rows, **asdict(summary), "profile": profiled})


def _print_profile(profile: "Profile") -> None:
    if not profile.batches:
        out.print("no profile: it excludes the first micro-batch, in which the workers start, and there was no other")
        return
    table = new_table("stage", "core-seconds", "share", "ms per image", lined=True)
    for column in table.columns[1:]:
        column.justify = "right"
    for one in profile.shares():
        per_image = 1000 * one.seconds / max(profile.images, 1)
        table.add_row(one.stage, f"{one.seconds:,.2f}", f"{one.share:.1%}", f"{per_image:.3f}")
    out.print(table)
    out.print(
        f"{counted(profile.images, 'image')} in {counted(profile.batches, 'micro-batch')} after the first: "
        f"{profile.wall_s:.1f} s wall-clock time on {profile.cores} cores, "
        f"{profile.images / max(profile.wall_s, 1e-9):,.1f} images/s; the stages account for {profile.measured:.1%}"
    )
