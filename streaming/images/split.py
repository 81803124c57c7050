"""The split into training and held-out images, by a hash of the image's content (or group) and the seed.

The side does not depend on the label, the time of arrival or other images: the same bytes are always on the same side,
and neither corrected labels nor new images change it. The number of held-out images is binomially distributed; a small
class may have none, which `check_sides` reports.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Self

from pyspark.sql import Column, DataFrame, Row
from pyspark.sql import functions as F  # noqa: N812  as Spark's own documentation writes it

from models.xxhash64 import HASH_BITS
from streaming.errors import DataError

CLASSES_SHOWN = 10


@dataclass(frozen=True)
class Split:
    """A split into training and held-out images.

    Attributes:
        seed: seed of the hash.
        share: expected fraction of held-out images.
        group_by: grouping of images, see `streaming.images.groups`; None for no grouping.
    """

    seed: int
    share: float
    group_by: str | None = None

    def held_out(self) -> Column:
        """Return a column: whether a row (image_id, and group_id if grouped) is held out."""
        unit = "image_id" if self.group_by is None else "group_id"
        hashed = F.shiftrightunsigned(F.xxhash64(unit, F.lit(self.seed)), 64 - HASH_BITS)
        return hashed < F.lit(round(self.share * 2**HASH_BITS))

    def sides(self, rows: DataFrame) -> tuple[DataFrame, DataFrame]:
        """Return (training rows, held-out rows)."""
        return rows.where(~self.held_out()), rows.where(self.held_out())


@dataclass(frozen=True)
class Sides:
    """A split into held-out, validation and fitting rows."""

    holdout: Split
    validation: Split

    @classmethod
    def of(cls, holdout: float, validation: float, seed: int, group_by: str | None = None) -> Self:
        """Return the split that holds out the same images as training with this seed does.

        Args:
            holdout: fraction of held-out images.
            validation: fraction of the remaining images used for validation.
        """
        return cls(Split(seed, holdout, group_by), Split(seed + 1, validation, group_by))

    def training(self, rows: DataFrame) -> tuple[DataFrame, DataFrame]:
        """Return (fitting rows, validation rows), without held-out rows."""
        training, _ = self.holdout.sides(rows)
        return self.validation.sides(training)


def check_sides(rows: DataFrame, split: Split) -> list[str]:
    """Return warnings about the classes on each side of a split of rows (image_id, label, and group_id if grouped).

    Raises:
        ServiceError: no image is held out, or fewer than two classes are left for training.
    """
    images, out = F.count(F.lit(1)), F.count_if(split.held_out())
    counts = rows.groupBy("label").agg(images.alias("images"), out.alias("held_out")).collect()
    counts.sort(key=attrgetter("label"))  # few rows, which Spark would sort in two more jobs
    to_fit = [one for one in counts if one.images > one.held_out]
    advice = "add images, or give another --holdout or --seed"
    if len(to_fit) < 2:  # noqa: PLR2004
        raise DataError(
            f"training needs images of at least two classes, got {[one.label for one in to_fit]} on the training side "
            f"(in all: {_counted(counts)}); {advice}"
        )
    if not any(one.held_out for one in counts):
        unit = "image" if split.group_by is None else "group of images"
        raise DataError(
            f"no image is held out ({_counted(counts)}): each {unit} is with probability {split.share:g}, by its "
            f"content and the seed; {advice}"
        )
    lines = []
    if none := [one for one in counts if not one.held_out]:
        lines.append(f"no image is held out of: {_counted(none)}; metrics do not cover these classes: {advice}")
    if unknown := [one for one in counts if one.images == one.held_out]:
        lines.append(f"every image is held out of: {_counted(unknown)}; the model cannot learn these classes: {advice}")
    return lines


def _counted(counts: Sequence[Row]) -> str:
    shown = ", ".join(f"{one.label} ({one.images:,})" for one in counts[:CLASSES_SHOWN])
    more = len(counts) - CLASSES_SHOWN
    return shown + (f" and {more:,} more" if more > 0 else "")
