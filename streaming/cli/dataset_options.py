"""The options that select labelled images, shared by all training commands."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from streaming.cli.command_line import Deprecated
from streaming.cli.console import warn
from streaming.errors import UsageError

if TYPE_CHECKING:
    from streaming.images.dataset import Dataset
    from streaming.settings import Settings


class Installed(StrEnum):
    """Data sets included in an installed package."""

    DIGITS = "digits"


ImagesOption = Annotated[
    str | None,
    typer.Option(
        metavar="PLACE",
        help="Images: a folder or s3://, gs:// or az:// URI with one folder per class, or a Parquet or Delta table.",
    ),
]
LabelsOption = Annotated[
    Path | None, typer.Option(metavar="CSV", help="CSV of labels, with the columns label and path, name or id.")
]
PatternOption = Annotated[
    str | None,
    typer.Option(
        metavar="REGEX",
        help="Pattern of the label in a file's path below the folder: its group `label`, or its first group.",
    ),
]
DatasetOption = Annotated[Installed | None, typer.Option(help="Installed data set to use instead of --images.")]
FlatOption = Annotated[
    bool,
    typer.Option("--flat/--pooled", help="Use all values of the last feature map as features, or its channel means."),
]
DEPRECATED_OUTPUT = Deprecated("--output", "--{}", only="pooled|flat")
LimitOption = Annotated[int, typer.Option(min=2, help="Number of images to take from --dataset.")]


def pooling_of(flat: bool) -> Literal["flat", "pooled"]:
    """Return the pooling that `--flat/--pooled` selects."""
    return "flat" if flat else "pooled"


def choose_dataset(
    settings: "Settings",
    images: str | None,
    dataset: Installed | None,
    limit: int,
    label_pattern: str | None,
    labels: Path | None,
) -> "Dataset":
    """Read the data set that the options select and print its warnings.

    Args:
        settings: the settings, for the folder of installed data sets.
        images: folder, URI or table of images; None with `dataset`.
        dataset: installed data set; None with `images`.
        limit: number of images to take from `dataset`.

    Raises:
        UsageError: both or neither of `images` and `dataset` are given.
        ServiceError: the images cannot be read.
    """
    from streaming.images.dataset import digit_images, read_dataset, write_images
    from streaming.images.sources import place_of

    if (images is None) == (dataset is None):
        raise UsageError("give either --images PLACE or --dataset digits")
    if images is None:
        source: Path | str = write_images(settings.work_dir / "datasets" / f"digits-{limit}", digit_images(limit))
    else:
        source = place_of(images)
    found = read_dataset(source, label_pattern=label_pattern, labels_csv=labels)
    warn(*found.warnings())
    return found
