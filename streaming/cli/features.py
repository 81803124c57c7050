"""`imagestream features`: a folder of images to a CSV, Parquet or Delta table of features."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import TYPE_CHECKING, Annotated

import typer

from streaming.cli.app import EXIT_FAILED, JsonOption, app, settings_of, write_json
from streaming.cli.command_line import MODELS, SPARK
from streaming.cli.console import Spinner, err, out, text_column, warn
from streaming.cli.images import FlatOption, pooling_of
from streaming.cli.interrupts import stoppable
from streaming.errors import UsageError
from streaming.jobs.output import FileFormat
from streaming.training.fit_options import FitOptions, ProjectionKind

if TYPE_CHECKING:
    from streaming.images.dataset import Dataset
    from streaming.jobs.export import Exported


@app.command(panel=MODELS, settings=SPARK)
def features(
    context: typer.Context,
    place: Annotated[
        str | None, typer.Argument(metavar="IMAGES", help="Old spelling of --images.", hidden=True)
    ] = None,
    *,
    images: Annotated[
        str | None,
        typer.Option(
            metavar="PLACE",
            help="Folder or s3://, gs:// or az:// URI of images, or a Parquet or Delta table of them.",
        ),
    ] = None,
    output: Annotated[
        str,
        typer.Option(
            "--output", "-o", metavar="PLACE", help="File to write, or folder of a Delta table, as a path or a URI."
        ),
    ],
    format_: Annotated[
        FileFormat | None, typer.Option("--format", help="Default: by the suffix of --output, else a Delta table.")
    ] = None,
    backbone: Annotated[str, typer.Option(help="The CNN that turns an image into features.")] = "efficientnet_lite0",
    weights: Annotated[str, typer.Option(help="imagenet, random, or a weights file that Keras saved.")] = "imagenet",
    flat: FlatOption = False,
    projection: Annotated[ProjectionKind, typer.Option(help="How to make the features fewer.")] = "pca",
    explained_variance: Annotated[
        float, typer.Option(help="PCA keeps the fewest components that explain this share.")
    ] = FitOptions.explained_variance,
    components: Annotated[int | None, typer.Option(help="Keep so many components instead.")] = None,
    eps: Annotated[float, typer.Option(help="A random projection keeps squared distances within 1 ± eps.")] = 0.1,
    model: Annotated[
        int | None, typer.Option(min=1, help="Take backbone and projection of this registered version.")
    ] = None,
    label_pattern: Annotated[
        str | None, typer.Option(metavar="REGEX", help="Its group `label`, or first group, in a path is the label.")
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(metavar="CSV", help="Labels from a CSV with the columns label and path, name or id.")
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Write the features of every image, with its path and label, in order of path.

    A run that was stopped goes on where it was: what the backbone gave is kept in HOME/featurized, also for other
    projections later; remove that folder when it is not needed any more. An image that does not decode is left out and
    told, and the exit code is then 1.

    Example: imagestream features --images fruits/ --output fruits.csv --backbone mobilenet_v2 --explained-variance 0.9
    """
    from streaming.images.dataset import read_dataset
    from streaming.images.sources import place_of
    from streaming.jobs.output import check_output, output_format

    if place is not None and images is None:
        warn(f"features IMAGES is an old spelling and will be removed: write --images {place}")
        images, place = place, None
    if images is None or place is not None:
        raise UsageError("give the images once, by --images PLACE")
    settings = settings_of(context)
    options = FitOptions(projection, explained_variance, components, eps)
    target = place_of(output)
    kind = output_format(target, format_)
    check_output(target, kind)
    dataset = read_dataset(place_of(images), label_pattern=label_pattern, labels_csv=labels, labelled=False)
    warn(*dataset.warnings())

    from streaming.jobs.export import backbone_source, export_features, model_source  # takes a second

    with TemporaryDirectory(prefix="imagestream-") as scratch:
        if model is not None:
            source = model_source(settings, model, Path(scratch))
        else:
            with Spinner(f"exporting {backbone}"):
                source = backbone_source(settings, backbone, weights, pooling_of(flat), options)
        with stoppable("the same command continues where it was"), _progress(dataset.n_images) as show:
            result = export_features(settings, dataset, source, options, target, kind, show)
    _tell(result, dataset, output, json_file)


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None] | None]:
    """A bar with images/s on a terminal; None elsewhere."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    if not err.is_terminal:
        yield None
        return
    columns = (text_column("featurizing"), BarColumn(), MofNCompleteColumn(), text_column("{task.fields[rate]}"))
    with Progress(*columns, TimeRemainingColumn(), console=err, transient=True) as bar:
        task = bar.add_task("features", total=total, rate="")
        started: list[float] = []  # what was featurized before costs no time, and Spark's start is not counted

        def show(done: int) -> None:
            now = perf_counter()
            started.append(now)
            seconds = now - started[0]
            bar.update(task, completed=done, rate=f"{done / seconds:,.0f} images/s" if seconds else "")

        yield show


def _tell(result: "Exported", dataset: "Dataset", output: str, json_file: Path | None) -> None:
    found = result.featurized
    warn(*found.warnings(), *(f"left out {path}: {why}" for path, why in found.bad.items()))
    if found.n_bad > len(found.bad):
        err.print(f"left out {found.n_bad - len(found.bad):,} more", style="yellow")
    kept = f" ({result.variance_kept:.1%} of the variance)" if result.variance_kept else ""
    out.print(
        f"{output}: {result.rows:,} of {dataset.n_images:,} images, {result.n_components:,} columns{kept}; "
        f"{found.reused:,} had been featurized before",
    )
    summary = {"output": str(output), **asdict(result), "dataset": dataset.as_summary()}
    write_json(json_file, summary)
    if result.rows < dataset.n_images:
        raise typer.Exit(EXIT_FAILED)
