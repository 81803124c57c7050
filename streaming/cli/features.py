"""`imagestream features`: write the features of images to a CSV, Parquet or Delta table."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import TYPE_CHECKING, Annotated

import typer

from streaming.cli.app import EXIT_FAILED, JsonOption, app, settings_of, write_json
from streaming.cli.backbone_options import WeightsOption
from streaming.cli.command_line import MODELS, SPARK
from streaming.cli.console import Spinner, err, out, text_column, warn
from streaming.cli.dataset_options import FlatOption, LabelsOption, PatternOption, pooling_of
from streaming.cli.fit_options import OPTIONS
from streaming.cli.interrupts import stoppable
from streaming.errors import UsageError
from streaming.jobs.output import FileFormat
from streaming.training.fit_options import FitOptions, ProjectionKind
from streaming.wording import counted

if TYPE_CHECKING:
    from streaming.images.dataset import Dataset
    from streaming.jobs.export import Exported


@app.command(panel=MODELS, settings=SPARK)
def features(
    context: typer.Context,
    place: Annotated[
        str | None, typer.Argument(metavar="IMAGES", help="Deprecated spelling of --images.", hidden=True)
    ] = None,
    *,
    images: Annotated[
        str | None,
        typer.Option(
            metavar="PLACE", help="Images: a folder, an s3://, gs:// or az:// URI, or a Parquet or Delta table."
        ),
    ] = None,
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="PLACE", help="File or Delta table to write, as a path or URI.")
    ],
    format_: Annotated[
        FileFormat | None,
        typer.Option("--format", help="Format of the output; default: by the suffix of --output, else a Delta table."),
    ] = None,
    backbone: Annotated[str, typer.Option(help="CNN that computes the features.")] = "efficientnet_lite0",
    weights: WeightsOption = "imagenet",
    flat: FlatOption = False,
    projection: Annotated[
        ProjectionKind, typer.Option(help="Dimensionality reduction applied to the features.")
    ] = "pca",
    explained_variance: Annotated[float, OPTIONS["explained_variance"]] = FitOptions.explained_variance,
    components: Annotated[int | None, OPTIONS["n_components"]] = None,
    eps: Annotated[float, OPTIONS["eps"]] = 0.1,
    model: Annotated[
        int | None, typer.Option(min=1, help="Registered version whose backbone and projection to use.")
    ] = None,
    label_pattern: PatternOption = None,
    labels: LabelsOption = None,
    json_file: JsonOption = None,
) -> None:
    """Write the features of every image with its path and label, sorted by path.

    An interrupted run continues where it stopped: the backbone's output is kept in HOME/featurized, also for later runs
    with other projections; delete that folder when it is no longer needed. Images that cannot be decoded are skipped
    and reported, and the exit code is then 1.

    Example: imagestream features --images fruits/ --output fruits.csv --backbone mobilenet_v2 --explained-variance 0.9
    """
    from streaming.images.dataset import read_dataset
    from streaming.images.sources import place_of
    from streaming.jobs.output import check_output, output_format

    if place is not None and images is None:
        warn(f"features IMAGES is deprecated and will be removed: write --images {place}")
        images, place = place, None
    if images is None or place is not None:
        raise UsageError("give the images once, with --images PLACE")
    settings = settings_of(context)
    options = FitOptions(projection, explained_variance, components, eps)
    target = place_of(output)
    kind = output_format(target, format_)
    check_output(target, kind)
    dataset = read_dataset(place_of(images), label_pattern=label_pattern, labels_csv=labels, labelled=False)
    warn(*dataset.warnings())

    from streaming.jobs.export import backbone_source, export_features, model_source  # slow to import

    with TemporaryDirectory(prefix="imagestream-") as scratch:
        if model is not None:
            source = model_source(settings, model, Path(scratch))
        else:
            with Spinner(f"exporting {backbone}"):
                source = backbone_source(settings, backbone, weights, pooling_of(flat), options)
        with stoppable("run the same command again to continue"), _progress(dataset.n_images) as show:
            result = export_features(settings, dataset, source, options, target, kind, show)
    _print_result(result, dataset, output, json_file)


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None] | None]:
    """Yield a function that shows progress and images/s on a terminal; None elsewhere."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    if not err.is_terminal:
        yield None
        return
    columns = (text_column("featurizing"), BarColumn(), MofNCompleteColumn(), text_column("{task.fields[rate]}"))
    with Progress(*columns, TimeRemainingColumn(), console=err, transient=True) as bar:
        task = bar.add_task("features", total=total, rate="")
        started: list[float] = []  # when the first image was done: Spark's start does not count

        def show(done: int) -> None:
            now = perf_counter()
            started.append(now)
            seconds = now - started[0]
            bar.update(task, completed=done, rate=f"{done / seconds:,.0f} images/s" if seconds else "")

        yield show


def _print_result(result: "Exported", dataset: "Dataset", output: str, json_file: Path | None) -> None:
    found = result.featurized
    warn(*found.warnings(), *(f"left out {path}: {why}" for path, why in found.bad.items()))
    if found.n_bad > len(found.bad):
        err.print(f"left out {found.n_bad - len(found.bad):,} more", style="yellow")
    kept = f" ({result.variance_kept:.1%} of the variance)" if result.variance_kept else ""
    out.print(
        f"{output}: {result.rows:,} of {counted(dataset.n_images, 'image')}, "
        f"{counted(result.n_components, 'column')}{kept}; {found.reused:,} reused from an earlier run"
    )
    summary = {"output": str(output), **asdict(result), "dataset": dataset.as_summary()}
    write_json(json_file, summary)
    if result.rows < dataset.n_images:
        raise typer.Exit(EXIT_FAILED)
