"""Paired comparison of two models on the same images: the gain of one over the other, and a lower bound on it.

The holdout images are a sample. The Bayesian bootstrap (Rubin 1981, "The Bayesian Bootstrap", Annals of Statistics 9)
weights them by a Dirichlet distribution: a smooth version of the paired bootstrap. By itself it accounts only for
observed differences, but five images without a disagreement do not prove that there is none. So one pseudo-image is
added, on which the candidate has the largest possible loss. The resulting bound for a mean of bounded differences is
Gaffke's (Gaffke 2005, "Three test statistics for a nonparametric one-sided hypothesis on the mean of a nonnegative
variable", Mathematical Methods of Statistics 14; Learned-Miller and Thomas 2020, "A New Confidence Interval for the
Mean of a Bounded Random Variable"):

- if only losses are observed, it is the exact bound of Clopper and Pearson (1934);
- for accuracy and a margin of 0, it is the exact sign test of the discordant images (McNemar's);
- with many images, it is the bound of the paired bootstrap.

Its validity for every distribution and every number of images is conjectured, not proved; the simulations in
tests/statistics show the error rates.
"""

import math
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray
from scipy.integrate import quad
from scipy.optimize import brentq
from scipy.sparse import csr_array

from models.evaluation import Interval
from models.score_histogram import Counts

Floats = NDArray[np.float64]

MAX_CELLS_DRAWN = 2**27  # cells times draws of the bootstrap of F1, which take seconds
MAX_CELLS_HELD = 2**22  # of them in memory at a time
MIN_DRAWS, DRAWS_BELOW = 1_000, 50  # the minimum in all, and in the tail below the level
MAX_GROWTH = 2.0**20  # the largest multiple of the images for which `images_needed` returns a number


@dataclass(frozen=True)
class PairedCounts:
    """The numbers of images that each of two models classified correctly."""

    both: int = 0
    only_candidate: int = 0
    only_champion: int = 0
    neither: int = 0

    @property
    def rows(self) -> int:
        return self.both + self.only_candidate + self.only_champion + self.neither

    @property
    def gain(self) -> float:
        """The candidate's accuracy minus the champion's."""
        return (self.only_candidate - self.only_champion) / max(1, self.rows)


@dataclass(frozen=True, eq=False)
class MeanGain:
    """A gain that is a mean over images, from counts of the differences.

    Attributes:
        values: (V,) distinct differences per image, candidate minus champion, within ±`most`.
        counts: (V,) images of each.
        most: the largest possible difference of an image.
        extra: the weight of the pseudo-image on which the candidate loses `most`: 1 for a conservative bound, 1/2 for
            two-sided intervals.
    """

    values: Floats
    counts: Counts
    most: float
    extra: float = 1.0

    @property
    def rows(self) -> int:
        """The number of images compared."""
        return int(self.counts.sum())

    @property
    def value(self) -> float:
        """The gain on these images; positive if the candidate is better."""
        return float((self.values * self.counts).sum()) / max(1, self.rows)

    def p_value(self, margin: float, level: float = 0.0, growth: float = 1.0) -> float:
        """The bootstrap probability of gains of at most `margin`: the p-value of "the gain is at most the margin".

        Computed to about 1e-8 without sampling: Dirichlet weights are gamma variables divided by their sum, so the mean
        is below the margin if a weighted sum of independent gamma variables is negative. Its characteristic function is
        inverted by the formula of Gil-Pelaez (Imhof 1961, "Computing the distribution of quadratic forms in normal
        variables", Biometrika 48).

        Args:
            level: the significance level; used only by gains that are sampled.
            growth: the factor by which to multiply the number of images, with the same predictions.
        """
        del level
        seen = self.counts > 0
        shapes = np.append(self.counts[seen] * growth, self.extra)
        steps = np.append(self.values[seen], -self.most) - margin
        if (steps >= 0).all() or (steps <= 0).all():
            return float((steps <= 0).all())
        steps /= math.sqrt(float(shapes @ steps**2))  # to a variance of 1

        def integrand(t: float) -> float:
            angle = float(shapes @ np.arctan(t * steps))
            size = math.exp(-0.5 * float(shapes @ np.log1p((t * steps) ** 2)))
            return float(math.sin(angle) * size / t)

        near, far = (quad(integrand, *ends, limit=400, epsabs=1e-9)[0] for ends in ((0, 8), (8, np.inf)))
        return float(min(1.0, max(0.0, 0.5 - (near + far) / math.pi)))

    def lower_bound(self, confidence: float) -> float:
        """The lower bound on the true gain with this one-sided confidence."""
        seen = self.values[self.counts > 0]
        if not self.rows or seen.max() <= -self.most:
            return -self.most
        step, high = 1 / math.sqrt(self.rows), float(seen.max())
        low = self.value
        while low > -self.most and self.p_value(low) > 1 - confidence:
            high, low, step = low, max(-self.most, low - step * self.most / 4), step * 2
        return float(brentq(lambda gain: self.p_value(gain) - (1 - confidence), low, high, xtol=1e-9))

    def swapped(self) -> Self:
        """The gain of the champion over the candidate."""
        return replace(self, values=-self.values)


@dataclass(frozen=True, eq=False)
class F1Gain:
    """A gain in macro F1, or in the F1 of one class, from counts of images by truth and both predictions.

    F1 is not a mean over images, so the bootstrap is sampled. Two pseudo-images are distributed over the classes, each
    predicted correctly by the champion and as the next class by the candidate, which costs the candidate recall of the
    one and precision of the other.

    Attributes:
        n_classes: K, the classes that either model knows or that occur.
        cells: (M, 3) class indices: the truth, the candidate's prediction, the champion's.
        counts: (M,) images of each.
        only: the index of the class whose F1 it is; None for the mean over the classes.
        extra: as for `MeanGain`.
        seed: of the samples.
    """

    n_classes: int
    cells: Counts
    counts: Counts
    only: int | None = None
    extra: float = 1.0
    seed: int = 0

    @property
    def rows(self) -> int:
        return int(self.counts.sum())

    @property
    def value(self) -> float:
        """The gain on these images, over the classes that are true or predicted for any."""
        return float(self._gains(self.counts[None, :].astype(np.float64), self.cells)[0]) if self.rows else 0.0

    def p_value(self, margin: float, level: float, growth: float = 1.0) -> float:
        """As `MeanGain.p_value`; more samples are drawn for smaller levels."""
        below = self._drawn(level, growth) <= margin
        return float(1 + below.sum()) / (1 + len(below))  # never 0 (Davison and Hinkley 1997, section 4.2)

    def lower_bound(self, confidence: float) -> float:
        return float(np.quantile(self._drawn(1 - confidence, 1.0), 1 - confidence, method="lower"))

    def swapped(self) -> Self:
        return replace(self, cells=self.cells[:, [0, 2, 1]])

    def _drawn(self, level: float, growth: float) -> Floats:
        """Gains in bootstrap samples, of which about `DRAWS_BELOW` are in the tail of probability `level`."""
        names = np.arange(self.n_classes)
        cells = np.concatenate([self.cells, np.stack([names, np.roll(names, -1), names], axis=1)])
        shapes = np.append(self.counts * growth, np.full(self.n_classes, 2 * self.extra / self.n_classes))
        wanted = min(DRAWS_BELOW / level, MAX_CELLS_DRAWN / len(cells))
        generator, found, left = np.random.default_rng(self.seed), [], max(MIN_DRAWS, int(wanted))
        while left > 0:
            n = min(left, max(1, MAX_CELLS_HELD // len(cells)))
            found.append(self._gains(generator.standard_gamma(shapes, (n, len(cells))), cells))
            left -= n
        return np.concatenate(found)

    def _gains(self, weights: Floats, cells: Counts) -> Floats:
        """(B, M) weights of cells → (B,) the candidate's F1 minus the champion's."""
        truth, ours, theirs = cells.T

        def summed(index: Counts, kept: NDArray[np.bool_] | bool = True) -> Floats:
            """(B, K) weights by class."""
            into = np.full(len(cells), 1.0) * kept
            by_class = csr_array((into, (np.arange(len(cells)), index)), (len(cells), self.n_classes))
            return np.asarray(weights @ by_class)

        real = summed(truth)
        named = summed(ours), summed(theirs)
        scores = []
        for answers, whole in zip((ours, theirs), named, strict=True):
            hits = 2 * summed(truth, truth == answers)
            scores.append(np.divide(hits, real + whole, out=np.zeros_like(hits), where=hits > 0))
        difference = scores[0] - scores[1]
        if self.only is not None:
            return np.asarray(difference[:, self.only])
        occurring = (real + named[0] + named[1]) > 0
        return np.asarray(difference.sum(axis=1) / occurring.sum(axis=1))


Gain = MeanGain | F1Gain


def gain_interval(gain: Gain, confidence: float) -> Interval:
    """The two-sided confidence interval of the gain, with half the weight of the pseudo-image on each side."""
    evenly, one_sided = replace(gain, extra=gain.extra / 2), (1 + confidence) / 2
    return Interval(evenly.lower_bound(one_sided), -evenly.swapped().lower_bound(one_sided))


def images_needed(gain: Gain, margin: float, level: float) -> int | None:
    """Estimate the number of images, with the same predictions, needed to show a gain above the margin.

    Args:
        level: one minus the confidence.

    Returns:
        The number; None if no number of images would be enough.
    """
    if not gain.rows or gain.value <= margin:
        return None
    low, high = 1.0, 2.0
    while gain.p_value(margin, level, high) >= level:
        low, high = high, high * 2
        if high > MAX_GROWTH:
            return None
    while high / low > 1.02:  # noqa: PLR2004  precise enough
        middle = math.sqrt(low * high)
        low, high = (low, middle) if gain.p_value(margin, level, middle) < level else (middle, high)
    return math.ceil(gain.rows * high)
