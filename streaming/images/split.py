"""Which images are held out: decided by the hash of the image's content, or of its group, and the seed alone.

Neither the label nor the time of arrival counts, nor what other images there are. So the same bytes are on one side
under whatever name they come, a corrected label changes no side, and growth changes none. How many are held out follows
the binomial distribution: of a small class there may be none, which `check_sides` reports.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from pyspark.sql import Column, DataFrame, Row
from pyspark.sql import functions as F  # noqa: N812  as Spark's own documentation writes it

from models.xxhash64 import HASH_BITS
from streaming.errors import DataError

CLASSES_SHOWN = 10


@dataclass(frozen=True)
class Split:
    """Which images are held out.

    Attributes:
        seed: of the hash.
        share: of the images, expected to be held out.
        group_by: how images are grouped, see `streaming.images.groups`; None: each one for itself.
    """

    seed: int
    share: float
    group_by: str | None = None

    def held_out(self) -> Column:
        """Whether a row with the column image_id, and group_id where images are grouped, is held out."""
        unit = "image_id" if self.group_by is None else "group_id"
        hashed = F.shiftrightunsigned(F.xxhash64(unit, F.lit(self.seed)), 64 - HASH_BITS)
        return hashed < F.lit(round(self.share * 2**HASH_BITS))

    def sides(self, rows: DataFrame) -> tuple[DataFrame, DataFrame]:
        """(training rows, holdout rows)."""
        return rows.where(~self.held_out()), rows.where(self.held_out())


@dataclass(frozen=True)
class Sides:
    """How rows are divided: held out for good, to validate on, to fit on."""

    holdout: Split
    validation: Split

    @classmethod
    def of(cls, holdout: float, validation: float, seed: int, group_by: str | None = None) -> Self:
        """Hold out what a training with this seed holds out, and divide the rest by another seed."""
        return cls(Split(seed, holdout, group_by), Split(seed + 1, validation, group_by))

    def training(self, rows: DataFrame) -> tuple[DataFrame, DataFrame]:
        """(rows to fit on, rows to validate on); the held out ones are in neither."""
        training, _ = self.holdout.sides(rows)
        return self.validation.sides(training)


def check_sides(rows: DataFrame, split: Split) -> list[str]:
    """What to know of how a split divides the classes of rows (image_id, label, and group_id if grouped), a line each.

    Raises:
        ServiceError: nothing is held out, or fewer than two classes are left to fit on.
    """
    images, out = F.count(F.lit(1)), F.count_if(split.held_out())
    counts = rows.groupBy("label").agg(images.alias("images"), out.alias("held_out")).orderBy("label").collect()
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
            f"no image fell into the holdout ({_counted(counts)}): each {unit} does with probability {split.share:g}, "
            f"by its content and the seed; {advice}"
        )
    lines = []
    if none := [one for one in counts if not one.held_out]:
        lines.append(f"no image is held out of: {_counted(none)}; the figures say nothing of these classes: {advice}")
    if unknown := [one for one in counts if one.images == one.held_out]:
        lines.append(f"every image is held out of: {_counted(unknown)}; the model cannot know these classes: {advice}")
    return lines


def _counted(counts: Sequence[Row]) -> str:
    shown = ", ".join(f"{one.label} ({one.images:,})" for one in counts[:CLASSES_SHOWN])
    more = len(counts) - CLASSES_SHOWN
    return shown + (f" and {more:,} more" if more > 0 else "")
