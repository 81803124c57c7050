"""`imagestream predict`: classify images without a stream."""

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from streaming.cli.app import EXIT_FAILED, JsonOption, app, settings_of, write_json
from streaming.cli.command_line import IMAGES
from streaming.cli.console import err, text_column
from streaming.cli.interrupts import stoppable, stopping_cleanly
from streaming.cli.output import FormatOption, OutputOption
from streaming.cli.output_formats import Format, Rows, check_format, write_rows
from streaming.cli.query import SpreadsheetOption, pipe_may_close
from streaming.errors import UsageError
from streaming.wording import counted

if TYPE_CHECKING:
    import pyarrow as pa

    from streaming.predict import Prediction

STDIN = "-"
ROWS_PER_BATCH = 8
NUMBERS = frozenset([2])  # the column of confidences
IN_A_TABLE = ["source", "label", "confidence", "top_k", "reason", "detail"]  # the other formats have every column


@app.command(panel=IMAGES)
def predict(
    context: typer.Context,
    images: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGE…",
            help="Files, folders, http(s):// URLs, or s3://, gs:// or az:// URIs; - for one image on standard input.",
        ),
    ],
    model: Annotated[
        str, typer.Option(metavar="MODEL", help="Model to use: champion, challenger or a version number.")
    ] = "champion",
    top: Annotated[int, typer.Option(min=1, help="Number of classes in the column top_k.")] = 5,
    format_: FormatOption = Format.TABLE,
    output: OutputOption = None,
    spreadsheet: SpreadsheetOption = False,
    json: JsonOption = None,
) -> None:
    """Classify images with a registered model, without Kafka or Spark.

    All regular files below a folder are classified, in order of their names. Predictions are bitwise identical to those
    of the stream. An image that cannot be decoded gets a row with the reason, and the exit code is then 1.

    Example: imagestream predict photos/ --top 3 --format csv, or: imagestream predict - < photo.jpg
    """
    check_format(format_, output, spreadsheet=spreadsheet)
    settings = settings_of(context)
    import pyarrow as pa

    from streaming.predict import ROW, load_model

    counts: Counter[str] = Counter()
    with stopping_cleanly(), stoppable("the rows written so far are complete"), _progress() as show:
        most = settings.image_limits.max_bytes + 1  # one byte more than an image may have
        sources = [sys.stdin.buffer.read(most) if one == STDIN else one for one in images]
        loaded = load_model(settings, model)
        since = perf_counter()
        predictions = _counted(loaded.predict_each(sources, top=top), counts, show)
        with pipe_may_close():
            names = IN_A_TABLE if format_ is Format.TABLE else ROW.names
            found = (_row(one, format_) for one in predictions)
            # Arrow imports pandas for rows: they are built only if Parquet is written.
            arrow = pa.RecordBatchReader.from_batches(ROW, _batches(found, ROW))
            values = (tuple(row[name] for name in names) for row in found)
            write_rows(Rows(names, values, arrow, NUMBERS), format_, output, spreadsheet=spreadsheet)
            sys.stdout.flush()
        seconds = perf_counter() - since
    done = counts.total()
    bad = {reason: count for reason, count in counts.items() if reason}
    summary = {
        "images": done,
        "predicted": counts[""],
        "bad": bad,
        "model_version": loaded.version,
        "bundle_sha256": loaded.bundle_sha256,
        "engine": loaded.engine,
        "seconds": seconds,
        "images_per_s": done / seconds if seconds else 0.0,
    }
    write_json(json, summary)
    if not done:
        raise UsageError(f"expected images, got folders without a file: {', '.join(images)}")
    rate = f"{seconds:.1f} s ({summary['images_per_s']:,.0f} images/s)"
    err.print(f"{counted(done, 'image')} in {rate}, model version {loaded.version}")
    if bad:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(bad.items()))
        err.print(f"{sum(bad.values()):,} without a prediction: {reasons}")
        raise typer.Exit(EXIT_FAILED)


def _row(prediction: "Prediction", format_: Format) -> dict[str, Any]:
    """Return the prediction's fields; a table shows `top_k` as text."""
    row = prediction.as_dict()
    if format_ is Format.TABLE:
        row["top_k"] = ", ".join(f"{label} {probability:.3f}" for label, probability in prediction.top_k)
    return row


def _counted(
    predictions: "Iterable[Prediction]", counts: Counter[str], show: Callable[[int], None]
) -> "Iterator[Prediction]":
    for one in predictions:
        counts[one.reason or ""] += 1
        show(counts.total())
        yield replace(one, source=one.source or STDIN)


def _batches(rows: Iterator[dict[str, Any]], schema: "pa.Schema") -> "Iterator[pa.RecordBatch]":
    import pyarrow as pa

    while some := list(islice(rows, ROWS_PER_BATCH)):
        yield pa.RecordBatch.from_pylist(some, schema)


@contextmanager
def _progress() -> Iterator[Callable[[int], None]]:
    """Show the number of classified images on a terminal."""
    if not err.is_terminal:
        yield lambda _: None
        return
    from rich.progress import Progress, SpinnerColumn, TimeElapsedColumn

    columns = SpinnerColumn(), text_column("classifying {task.completed:,.0f} images"), TimeElapsedColumn()
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task("predict", total=None)
        yield lambda done: bar.update(task, completed=done)
