"""Who is held out: the same share of every class, by hash of the image's id.

An image's side depends on its id, the seed and its class's threshold alone. Equal images therefore never straddle, and
a retraining that keeps the thresholds compares models on images that neither was fitted on, however the data grows.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F  # noqa: N812  as Spark's own documentation writes it

from models.bundle import Bundle

DROPPED_BITS = 11  # 53 remain, which JSON's numbers hold exactly


@dataclass(frozen=True)
class Split:
    """Which images are held out.

    Attributes:
        seed: of the hash.
        thresholds: class → images whose hash lies below it are held out. A class that is not named has none.
    """

    seed: int
    thresholds: Mapping[str, int]

    def held_out(self) -> Column:
        """Whether a row with the columns image_id and label is held out."""
        cases = F.lit(0)
        if self.thresholds:
            pairs = [F.lit(part) for pair in sorted(self.thresholds.items()) for part in pair]
            cases = F.coalesce(F.element_at(F.create_map(*pairs), F.col("label")), cases)
        return _hash(self.seed) < cases

    def sides(self, rows: DataFrame) -> tuple[DataFrame, DataFrame]:
        """(training rows, holdout rows) of rows with the columns image_id and label."""
        return rows.where(~self.held_out()), rows.where(self.held_out())


def split_of(bundle: Bundle) -> Split:
    """The split that a version was fitted by."""
    data = bundle.manifest.training_data
    return Split(data.seed, data.holdout)


@dataclass(frozen=True)
class Sides:
    """How rows are divided: held out for good, to validate on, to fit on."""

    holdout: Split
    validation: Split

    def training(self, rows: DataFrame) -> tuple[DataFrame, DataFrame]:
        """(rows to fit on, rows to validate on); the held out ones are in neither."""
        training, _ = self.holdout.sides(rows)
        return self.validation.sides(training)


def unseen_by(bundle: Bundle, rows: DataFrame) -> DataFrame:
    """Those of `rows` (image_id, label) that a version was not fitted on: what its split holds out, and classes that it
    does not know."""
    return rows.where(split_of(bundle).held_out() | ~F.col("label").isin(*bundle.manifest.classes))


def plan_split(rows: DataFrame, share: float, seed: int, kept: Split | None = None) -> Split:
    """Hold out `share` of each class of `rows` (image_id, label), at least one image of every class that has two.

    Args:
        kept: an earlier split; if its seed is the same, its classes keep their thresholds.
    """
    known = dict(kept.thresholds) if kept and kept.seed == seed else {}
    by_hash = Window.partitionBy("label").orderBy("hash")
    per_class = Window.partitionBy("label")
    ranked = rows.select("label", _hash(seed).alias("hash")).select(
        "label",
        "hash",
        F.row_number().over(by_hash).alias("rank"),
        F.count(F.lit(1)).over(per_class).alias("n"),
    )
    wanted = F.greatest(F.lit(1), F.round(F.col("n") * share).cast("int"))
    new = ranked.where((F.col("n") > 1) & (F.col("rank") == F.least(wanted, F.col("n") - 1) + 1))
    found = {row.label: row.hash for row in new.select("label", "hash").collect()}
    return Split(seed, found | known)


def plan_sides(rows: DataFrame, holdout: float, validation: float, seed: int, champion: Bundle | None) -> Sides:
    """Hold out what a training with this seed holds out, and divide the rest by another seed."""
    of_holdout = plan_split(rows, holdout, seed, split_of(champion) if champion else None)
    training, _ = of_holdout.sides(rows)
    return Sides(of_holdout, plan_split(training, validation, seed + 1))


def _hash(seed: int) -> Column:
    return F.shiftrightunsigned(F.xxhash64("image_id", F.lit(seed)), DROPPED_BITS)
