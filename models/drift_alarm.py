"""A statistical test for drift with a known rate of false alarms, on a window over small micro-batches.

Without drift, the images of the window and of the reference come from one distribution. At each of the nine edges
between bins, the number of window images up to the edge is then hypergeometric, given the number of images of both up
to it: Fisher's exact test, once for each side. This involves no approximation for few images or small probabilities,
and accounts for the size of the reference. That the edges are order statistics of the reference does no harm for
continuous values: the exact distribution is the negative hypergeometric, whose tails equal those of Fisher's test on
one side and are smaller on the other. The p-value of a window is the smallest over all edges and components, times the
number of tests (Bonferroni, which holds under any dependence of components, or of windows that share images).

A window is tested at most every `TEST_EVERY_S` seconds, hence at most `TESTS_PER_DAY` times a day for any number of
micro-batches, each with a probability of a false alarm of `FALSE_ALARMS_PER_DAY` / `TESTS_PER_DAY`.
"""

from collections.abc import Hashable
from copy import deepcopy
from dataclasses import dataclass, replace
from math import exp, lgamma
from typing import Self

import numpy as np

from models.drift import DriftReference, DriftSums, psi_of

FALSE_ALARMS_PER_DAY = 0.01
TEST_EVERY_S = 300.0
TESTS_PER_DAY = 300  # 288, and some for restarts
LEVEL = FALSE_ALARMS_PER_DAY / TESTS_PER_DAY
MIN_PSI = 0.1  # customary; a smaller shift raises no alarm even if it is significant
MIN_ROWS = 20  # images in a window that is tested
ENOUGH_ROWS = 500  # images after which a tested window is replaced
EXACT = 8  # edges with the largest deviations, whose p-values are computed


def p_value(reference: DriftReference, seen: DriftSums) -> float:
    """An upper bound on the probability of the largest deviation at any edge without drift.

    1 if the images of the reference were not held out.
    """
    if not reference.held_out or not seen.rows:
        return 1.0
    n, total = seen.rows, seen.rows + reference.rows
    now = np.cumsum(seen.counts, axis=1)[:, :-1].reshape(-1)
    both = now + np.cumsum(np.rint(reference.counts).astype(np.int64), axis=1)[:, :-1].reshape(-1)
    share = both / total
    spread = np.sqrt(n * share * (1 - share) * reference.rows / max(1, total - 1))
    far = np.divide(now - n * share, spread, out=np.zeros(len(now)), where=spread > 0)
    farthest = np.argsort(-np.abs(far), kind="stable")[:EXACT]
    tails = [
        _tail(int(now[at]), int(both[at]), n, total)
        if far[at] > 0
        else _tail(int(n - now[at]), int(total - both[at]), n, total)
        for at in farthest
    ]
    tests = 2 * len(now)
    return min(1.0, tests * min(tails))


def _tail(found: int, marked: int, n: int, total: int) -> float:
    """The probability that `n` images drawn from `total` include at least `found` of the `marked` ones.

    The hypergeometric probability of exactly `found`, times the sum of the ratios of the following ones to it.
    `scipy.stats.hypergeom.sf` is the same, but its import takes two fifths of the time of all imports of the stream.
    """
    if found <= max(0, n + marked - total):
        return 1.0
    first = _log_choices(marked, found) + _log_choices(total - marked, n - found) - _log_choices(total, n)
    k = np.arange(found, min(marked, n), dtype=np.float64)
    ratios = (marked - k) / (k + 1) * (n - k) / (total - marked - n + k + 1)
    return exp(first) * (1.0 + float(np.cumprod(ratios).sum()))


def _log_choices(n: int, k: int) -> float:
    """The logarithm of the number of subsets of `k` of `n` elements."""
    return lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1)


def verdict(reference: DriftReference, seen: DriftSums) -> dict[str, float]:
    """Test a window for drift.

    Returns:
        `window_rows`; `window_psi`, the largest index of a component or of the confidence; `p_value`; `p_limit`, the
        significance level; and `alarm`, 1 if the p-value is at most the level and the index at least `MIN_PSI`, else
        0.
    """
    p, psi = p_value(reference, seen), float(psi_of(seen.counts, reference.counts).max())
    alarm = p <= LEVEL and psi >= MIN_PSI
    return {"window_rows": float(seen.rows), "window_psi": psi, "p_value": p, "p_limit": LEVEL, "alarm": float(alarm)}


@dataclass(frozen=True)
class DriftWindow:
    """Statistics of the images of recent micro-batches of one model, until they are tested.

    The window is kept in memory: after a restart it is empty, and the next test may come early.

    Attributes:
        model: identifies the model.
        tested_s: the time of the last test on a monotonic clock; None for never.
    """

    model: Hashable = None
    seen: DriftSums | None = None
    tested_s: float | None = None

    def after(
        self, model: Hashable, reference: DriftReference, batch: DriftSums, now_s: float
    ) -> tuple[Self, dict[str, float]]:
        """Return the window after one more micro-batch, and the result of the test if it is due, else empty."""
        seen = deepcopy(batch)
        if self.seen is not None and self.model == model:
            seen.merge(self.seen)
        grown = replace(self, model=model, seen=seen)
        due = self.tested_s is None or now_s - self.tested_s >= TEST_EVERY_S
        if not due or not reference.held_out or seen.rows < MIN_ROWS:
            return grown, {}
        rest = None if seen.rows >= ENOUGH_ROWS else seen
        return replace(grown, seen=rest, tested_s=now_s), verdict(reference, seen)
