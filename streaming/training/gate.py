"""The gate: whether a candidate takes the champion's place, by the answers of both to the same images.

Only images that one of the two gets right and the other wrong tell them apart. The paired bootstrap draws as many
images as there are, with replacement, again and again, and looks at the candidate's gain in accuracy in each draw
(Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapter 16). Of an image nothing counts but which of
the two were right, so a draw is one of four counts, multinomial, and the images need not leave the workers.

A gate that is passed again and again with the same holdout is passed by chance some day: the holdout should grow with
the data, as it does here.
"""

from dataclasses import dataclass

import numpy as np
from pyspark.sql import DataFrame
from pyspark.sql import functions as F  # noqa: N812  as Spark's own documentation writes it

from models.scorer import Head
from streaming.training.evaluate import predict
from streaming.training.fit_options import GateOptions

DRAWS = 10_000
MAX_INT8_COST = 0.01  # of accuracy


@dataclass(frozen=True)
class PairedCounts:
    """How many images each of two models got right."""

    both: int = 0
    only_candidate: int = 0
    only_champion: int = 0
    neither: int = 0

    @property
    def rows(self) -> int:
        return self.both + self.only_candidate + self.only_champion + self.neither

    @property
    def gain(self) -> float:
        """The candidate's accuracy less the champion's."""
        return (self.only_candidate - self.only_champion) / max(1, self.rows)


@dataclass(frozen=True)
class Verdict:
    """What the gate says.

    Attributes:
        low: what the candidate's gain is above with the confidence that was asked for; None if nothing was compared.
    """

    promote: bool
    why: str
    counts: PairedCounts | None = None
    low: float | None = None


def paired_counts(candidate: Head, candidate_rows: DataFrame, champion: Head, champion_rows: DataFrame) -> PairedCounts:
    """Count, on the workers, which of two models answer right where both have rows (image_id, label, features).

    The rows of the two differ in their features where the models have different backbones. The label is that of the
    candidate's.
    """
    ours = predict(candidate_rows, candidate).select("image_id", "label", F.col("predicted").alias("ours"))
    theirs = predict(champion_rows, champion).select("image_id", F.col("predicted").alias("theirs"))
    right = F.struct((F.col("ours") == F.col("label")).alias("a"), (F.col("theirs") == F.col("label")).alias("b"))
    found = {
        (row.right.a, row.right.b): row["count"]
        for row in ours.join(theirs, "image_id").groupBy(right.alias("right")).count().collect()
    }
    cases = ((True, True), (True, False), (False, True), (False, False))
    return PairedCounts(*(found.get(case, 0) for case in cases))


def lower_bound(counts: PairedCounts, confidence: float, seed: int) -> float:
    """The gain that the share `confidence` of bootstrap draws is not below."""
    cases = np.array([counts.only_candidate, counts.only_champion, counts.both + counts.neither])
    draws = np.random.default_rng(seed).multinomial(counts.rows, cases / counts.rows, DRAWS)
    gains = (draws[:, 0] - draws[:, 1]) / counts.rows
    return float(np.quantile(gains, 1 - confidence, method="lower"))


def decide(counts: PairedCounts, options: GateOptions, seed: int) -> Verdict:
    """Promote a candidate whose gain is above the margin, as far as the paired bootstrap supports it.

    Args:
        counts: of a holdout on which neither was fitted.
    """
    if not counts.rows:
        return Verdict(False, "not one held-out image has features for both backbones, so nothing was compared")
    low = lower_bound(counts, options.confidence, seed)
    promote = low > options.margin
    if options.margin < 0:
        verdict = ("is not " if promote else "may be ") + f"worse by {-options.margin:.4f}"
    else:
        verdict = ("is" if promote else "is not shown to be") + f" better by more than {options.margin:.4f}"
    why = (
        f"accuracy {counts.gain:+.4f} on the same {counts.rows:,} images ({counts.only_candidate:,} right by the "
        f"candidate only, {counts.only_champion:,} by the champion only), above {low:+.4f} with "
        f"{options.confidence:.0%} confidence: the candidate {verdict}"
    )
    return Verdict(promote, why, counts, low)


def refuse_costly_int8(verdict: Verdict, cost: float | None) -> Verdict:
    """Whatever the comparison says, 8-bit integers must not cost more than one point of accuracy."""
    if cost is None or cost <= MAX_INT8_COST:
        return verdict
    why = f"int8 costs {cost:.4f} of accuracy, more than the {MAX_INT8_COST} allowed; {verdict.why}"
    return Verdict(False, why, verdict.counts, verdict.low)
