"""`imagestream publish`: publish image files to the topic, with a progress bar and a summary."""

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from producer.sources import LabelFrom
from streaming.cli.app import EXIT_FAILED, EXIT_INTERRUPTED, JsonOption, app, settings_of, usage_errors, write_json
from streaming.cli.command_line import IMAGES
from streaming.cli.console import err, out, printable, progress_bar, text_column
from streaming.errors import ServiceError, UsageError
from streaming.storage.store import check_place, is_uri
from streaming.wording import counted

if TYPE_CHECKING:
    from producer import PublishSummary
    from producer.read import ReadOptions
    from producer.sources import Sources
    from streaming.settings import Settings

STDIN = "-"
LISTED = 20  # maximum number of file names shown on the terminal; --json has all of them


@app.command(panel=IMAGES, settings=("topic", "bootstrap_servers"))
def publish(
    context: typer.Context,
    paths: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PATH…",
            help="Files, folders, glob patterns, or s3://, gs:// or az:// URIs; - for names on standard input.",
        ),
    ] = None,
    label_from: Annotated[
        LabelFrom, typer.Option(help="Source of the labels; `parent` takes the name of a file's folder.")
    ] = LabelFrom.NONE,
    only_images: Annotated[
        bool, typer.Option("--only-images", help="Skip files whose content is not an image.")
    ] = False,
    skip_too_large: Annotated[
        bool, typer.Option("--skip-too-large", help="Skip files larger than the broker accepts instead of failing.")
    ] = False,
    from_csv: Annotated[
        Path | None, typer.Option(metavar="FILE", help="CSV of the files to publish, with the columns path and label.")
    ] = None,
    shrink_to: Annotated[
        int | None,
        typer.Option(
            min=16,
            metavar="PX",
            help="Maximum longest side in pixels; larger images are scaled down before they are sent.",
        ),
    ] = None,
    rate: Annotated[
        float | None, typer.Option(metavar="N", help="Maximum number of images per second; default: no limit.")
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Publish the files in the folders PATH…, then every new file, until Ctrl-C.")
    ] = False,
    follow_links: Annotated[
        bool, typer.Option("--follow-links", help="With --watch, follow symbolic links that lead out of the folders.")
    ] = False,
    state: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="File in which --watch records published files; default: HOME/publish/TOPIC.sqlite."
        ),
    ] = None,
    json: JsonOption = None,
) -> None:
    """Publish image files to Kafka.

    Every regular file is sent as one message, including hidden files and files that are not images: the stream
    quarantines those. The exit code is 0 only if the broker acknowledged every file that no option skips.

    With - as PATH, file names are read from standard input, one per line. A relative path in a CSV is resolved against
    the folder of the CSV.

    --watch sends each file once, even across restarts, as soon as it has not changed for a second. Hidden, empty and
    unfinished files (.part, .tmp, …) are not sent. After a crash, the last few files may be sent again, with the same
    image id.

    Example: imagestream publish --label-from parent photos/ 'more/*.jpg', or: imagestream publish --watch photos/
    """
    from producer.rate_limiter import RateLimiter
    from producer.read import ReadOptions
    from producer.topic_files import file_stem
    from streaming.platform.broker import bootstrap_servers as home_servers
    from streaming.platform.kafka_security import client_arguments
    from streaming.platform.topic import TopicOperation, check_access

    settings = settings_of(context)
    with usage_errors():  # reported before the broker is contacted
        RateLimiter(rate)
    reading = ReadOptions(only_images, skip_too_large, shrink_to=shrink_to, limits=settings.image_limits)
    if watch:
        folders = _folders(paths or [], from_csv)
    elif state is not None:
        raise UsageError("--state is an option of --watch: expected both, got --state alone")
    else:
        sources = _sources(paths or [], from_csv, label_from)
    servers, client = home_servers(settings), client_arguments(settings)
    check_access(servers, settings.topic, client, TopicOperation.WRITE)
    target = Target(servers, client, settings.topic)
    _warn_of_retention(settings, target)
    if watch:
        remembered = state or settings.work_dir / "publish" / f"{file_stem(settings.topic)}.sqlite"
        _watch(target, folders, remembered, label_from, reading, rate, json, follow_links)
    else:
        _publish(target, sources, reading, rate, json)


def _warn_of_retention(settings: "Settings", target: "Target") -> None:
    from streaming.pipeline.positions import committed_offsets
    from streaming.platform.topic import messages_near_retention

    try:
        _, ends = committed_offsets(settings)
        committed = {(target.topic, partition): end for partition, end in ends.items()}
        near = messages_near_retention(target.servers, [target.topic], committed, target.client)
    except ServiceError:  # publishing needs no tables, and reports an unreachable broker itself
        return
    for topic, count in near.items():
        err.print(
            f"{topic}: {counted(count, 'unprocessed message')} past half of Kafka's retention time: "
            "start `imagestream stream`",
            style="yellow",
        )


@dataclass(frozen=True)
class Target:
    """The broker and topic that images are published to."""

    servers: str
    client: Mapping[str, Any]
    topic: str


def _publish(target: Target, sources: "Sources", reading: "ReadOptions", rate: float | None, json: Path | None) -> None:
    from rich.progress import BarColumn, TaskProgressColumn, TimeElapsedColumn

    import producer
    from streaming.images.sources import ReadAhead

    uris = [file.name for file in sources.files if is_uri(file.name)] if isinstance(sources.files, list) else []
    ahead = ReadAhead(uris) if uris else None
    columns = (BarColumn(), TaskProgressColumn(), text_column("{task.fields[speed]}"), TimeElapsedColumn())
    with progress_bar(text_column("publishing"), *columns) as bar:
        task = bar.add_task("publish", total=None, speed="")

        def show(progress: producer.Progress) -> None:
            seconds = bar.tasks[task].elapsed or 0.0
            rate = (
                f"{progress.sent / seconds:,.0f} images/s {progress.bytes / 1e6 / seconds:,.1f} MB/s" if seconds else ""
            )
            bar.update(task, completed=progress.done, total=progress.total, speed=rate)

        summary = producer.publish(
            sources,
            bootstrap_servers=target.servers,
            client=target.client,
            topic=target.topic,
            only_images=reading.only_images,
            skip_too_large=reading.skip_too_large,
            shrink_to=reading.shrink_to,
            limits=reading.limits,
            rate=rate,
            fetch=ahead,
            on_progress=show if err.is_terminal else None,
        )
    if ahead is not None:
        ahead.close()
    write_json(json, asdict(summary) | {"complete": summary.complete})
    _print_summary(summary)
    if summary.interrupted:
        raise typer.Exit(EXIT_INTERRUPTED)
    if not summary.complete:
        raise typer.Exit(EXIT_FAILED)


def _watch(
    target: Target,
    folders: list[str],
    state: Path,
    label_from: LabelFrom,
    reading: "ReadOptions",
    rate: float | None,
    json: Path | None,
    follow_links: bool,
) -> None:
    from rich.progress import SpinnerColumn

    from producer.watch import WatchSummary, watch
    from streaming.signals import stop_signals

    columns = SpinnerColumn(), text_column("watching {task.fields[how]}")
    with progress_bar(*columns) as bar, stop_signals() as stop:
        task = bar.add_task("watch", total=None, how=f"{len(folders):,} folders")

        def show(summary: WatchSummary) -> None:
            bar.update(task, how=f"{len(folders):,} folders: sent {summary.sent:,}, skipped {summary.skipped:,}")

        summary = watch(
            folders,
            bootstrap_servers=target.servers,
            client=target.client,
            state=state,
            stop=stop,
            topic=target.topic,
            label_from=label_from,
            options=reading,
            rate=rate,
            follow_links=follow_links,
            on_change=show,
            on_failure=lambda why: err.print(f"not acknowledged, retrying: {why}", style="yellow"),
        )
    write_json(json, asdict(summary))
    out.print(
        f"sent {counted(summary.sent, 'file')} to {summary.topic} in {summary.seconds:.1f} s: "
        f"{summary.bytes / 1e6:,.1f} MB; {summary.skipped:,} skipped"
    )
    _print_files("skipped", [(skip.path, f"{skip.reason}: {skip.detail}") for skip in summary.skips])
    if summary.undelivered:
        err.print(f"not acknowledged: {counted(summary.undelivered, 'file')}; the next run sends them", style="red")
        raise typer.Exit(EXIT_FAILED)


def _folders(paths: list[str], from_csv: Path | None) -> list[str]:
    """Return the folders to watch."""
    if from_csv is not None or STDIN in paths:
        other = STDIN if from_csv is None else "--from-csv"
        raise UsageError(f"--watch needs folders: expected their names, got {other}")
    if not paths:
        raise UsageError("--watch needs folders: expected their names, got none")
    return paths


def _sources(paths: list[str], from_csv: Path | None, label_from: LabelFrom) -> "Sources":
    """Return the files to publish: from paths, the rows of a CSV, or the lines of standard input."""
    from producer.manifest import read_csv, read_lines
    from producer.sources import find_files

    if from_csv is not None:
        if paths:
            raise UsageError(f"expected either PATH… or --from-csv FILE, got both: {paths[0]} and {from_csv}")
        if label_from is not LabelFrom.NONE:
            raise UsageError("expected either --from-csv, which contains the labels, or --label-from, got both")
        return read_csv(from_csv)
    if STDIN in paths:
        if len(paths) > 1:
            raise UsageError(f"expected {STDIN} as the only path, for standard input, got other paths too")
        return read_lines(sys.stdin.buffer, label_from)
    if not paths:
        raise typer.BadParameter("Missing argument 'PATH…'")
    if not any(map(is_uri, paths)):
        return find_files(paths, label_from)
    return _in_bucket(paths, label_from)


def _in_bucket(paths: list[str], label_from: LabelFrom) -> "Sources":
    """Return the objects that URIs name or contain, and the files of the other paths."""
    from producer.sources import SourceFile, Sources, find_files, label_of
    from streaming.images.sources import list_source

    files: list[SourceFile] = []
    unreadable: list[tuple[str, str]] = []
    for path in paths:
        if not is_uri(path):
            found = find_files([path], label_from)
            files += found.files
            unreadable += found.unreadable
            continue
        uri = check_place(path)
        names = [f"{uri}/{one.key}" for one in list_source(uri)] or [uri]
        files += [SourceFile(name, label_of(name, label_from)) for name in names]
    return Sources(files, unreadable)


def _print_summary(summary: "PublishSummary") -> None:
    from rich.filesize import decimal

    out.print(
        f"sent {summary.sent:,} of {counted(summary.found, 'file')} to {summary.topic}: {decimal(summary.bytes)}"
        f" in {summary.seconds:.1f} s ({summary.images_per_second:,.0f} images/s,"
        f" {summary.megabytes_per_second:,.1f} MB/s)"
    )
    _print_files("skipped", [(skip.path, f"{skip.reason}: {skip.detail}") for skip in summary.skipped])
    _print_files("not delivered", [(failure.path, failure.reason) for failure in summary.failed])
    untried = summary.found - summary.sent - len(summary.skipped) - len(summary.failed)
    if untried:
        why = "Ctrl-C" if summary.interrupted else "the failure above"
        err.print(f"not acknowledged because of {why}: {counted(untried, 'file')}")


def _print_files(what: str, files: list[tuple[str, str]]) -> None:
    for name, reason in files[:LISTED]:
        err.print(f"{what} {printable(name)}: {printable(reason)}")
    if len(files) > LISTED:
        err.print(f"{what} {len(files) - LISTED:,} more (--json FILE lists them all)")
