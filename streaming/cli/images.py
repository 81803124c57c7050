"""The options that say which images, for every command that learns from them."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from streaming.cli.command_line import Old
from streaming.cli.console import warn
from streaming.errors import UsageError

if TYPE_CHECKING:
    from streaming.images.dataset import Dataset
    from streaming.settings import Settings


class Installed(StrEnum):
    """Data sets that come with an installed package."""

    DIGITS = "digits"


ImagesOption = Annotated[
    str | None,
    typer.Option(
        metavar="PLACE",
        help="Folder or s3://, gs:// or az:// URI with one folder of images per class; or a Parquet or Delta table.",
    ),
]
LabelsOption = Annotated[
    Path | None, typer.Option(metavar="CSV", help="Labels of a folder's files: columns label and path, name or id.")
]
PatternOption = Annotated[
    str | None, typer.Option(metavar="REGEX", help="Takes the label from a file's path below the folder.")
]
DatasetOption = Annotated[Installed | None, typer.Option(help="A small data set that is already installed.")]
FlatOption = Annotated[
    bool, typer.Option("--flat/--pooled", help="Features are every value of the last feature map, or its means.")
]
OLD_OUTPUT = Old("--output", "--{}", only="pooled|flat")
LimitOption = Annotated[int, typer.Option(min=2, help="How many images of --dataset to take.")]


def pooling_of(flat: bool) -> Literal["flat", "pooled"]:
    """The name of what `--flat/--pooled` chose."""
    return "flat" if flat else "pooled"


def choose_dataset(
    settings: "Settings",
    images: str | None,
    dataset: Installed | None,
    limit: int,
    label_pattern: str | None,
    labels: Path | None,
) -> "Dataset":
    """The data set that the options name; what is to know of it is told.

    Raises:
        ServiceError: both or neither of images and dataset, or images that cannot be read.
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
