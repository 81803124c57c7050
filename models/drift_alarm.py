"""Is it drift, or chance? A test whose error rate is known for any number of images, and a window for small batches.

Without drift, the images of a window and those of the reference are drawn alike. Then, at each of the nine edges
between the reference's bins, the number of new images up to the edge has a hypergeometric distribution, given how many
of both there are up to it: Fisher's exact test, one to each side. No approximation is made for few images, nor for
small probabilities, and the size of the reference counts. For values that are continuous the edges, which are order
statistics of the reference, do no harm: the exact distribution is the negative hypergeometric, whose tails are those of
Fisher's test to one side, and are smaller to the other. The p-value of a window is the smallest of all edges and
components, times how many tests there were (Bonferroni): components of a PCA are uncorrelated but not independent, and
Bonferroni's inequality holds whatever depends on what. It also holds for windows that share images, and a reference.

A window is judged at most every `TEST_EVERY_S` seconds, so there are at most `TESTS_A_DAY` a day however many
micro-batches there are, and each may err with probability `FALSE_ALARMS_A_DAY` / `TESTS_A_DAY`.
"""

from collections.abc import Hashable
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray
from scipy.stats import hypergeom

from models.drift import DriftReference, DriftSums, psi_of

FALSE_ALARMS_A_DAY = 0.01
TEST_EVERY_S = 300.0
TESTS_A_DAY = 300  # 288, and some for a process that starts again
LEVEL = FALSE_ALARMS_A_DAY / TESTS_A_DAY
LEAST_PSI = 0.1  # customary; a smaller shift raises no alarm, however certain it is
LEAST_ROWS = 20  # images of a window that is judged
ENOUGH_ROWS = 500  # images after which a window that was judged gives way to a new one
EXACT = 8  # edges whose p-value is computed: those farthest from what is expected


def p_value(reference: DriftReference, seen: DriftSums) -> float:
    """The probability, at most, that without drift some edge is as far from the reference as the farthest is now.

    1 for a reference without images that were held out.
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
        _tail(now[at], both[at], n, total) if far[at] > 0 else _tail(n - now[at], total - both[at], n, total)
        for at in farthest
    ]
    tests = 2 * len(now)
    return min(1.0, tests * min(tails))


def _tail(found: NDArray[np.int64], marked: NDArray[np.int64], n: int, total: int) -> float:
    """The probability of `found` or more of `marked` images among `n` that are drawn of `total`."""
    return float(hypergeom.sf(found - 1, total, marked, n))


def verdict(reference: DriftReference, seen: DriftSums) -> dict[str, float]:
    """What the images of a window say.

    Returns:
        `window_rows`, `window_psi`, the largest index of a component or of the confidence, `p_value`, `p_limit`, below
        which it is hardly chance, and `alarm`: 1 where it is below, and the index at least `LEAST_PSI`; else 0.
    """
    p, psi = p_value(reference, seen), float(psi_of(seen.counts, reference.counts).max())
    alarm = p <= LEVEL and psi >= LEAST_PSI
    return {
        "window_rows": float(seen.rows),
        "window_psi": psi,
        "p_value": p,
        "p_limit": LEVEL,
        "alarm": float(alarm),
    }


@dataclass(frozen=True)
class DriftWindow:
    """The images of the last micro-batches, of one model, until they are judged.

    It is kept in memory. A process that starts again begins with an empty one: images that were not judged yet are
    left out, and there is one more test than the clock would allow.

    Attributes:
        model: whose images they are.
        seen: what was counted of them.
        tested_s: when a window was last judged, by a clock that never goes back; None for never.
    """

    model: Hashable = None
    seen: DriftSums | None = None
    tested_s: float | None = None

    def after(
        self, model: Hashable, reference: DriftReference, batch: DriftSums, now_s: float
    ) -> tuple[Self, dict[str, float]]:
        """(the window after one more micro-batch, the verdict on it where it is due)."""
        seen = deepcopy(batch)
        if self.seen is not None and self.model == model:
            seen.merge(self.seen)
        grown = replace(self, model=model, seen=seen)
        due = self.tested_s is None or now_s - self.tested_s >= TEST_EVERY_S
        if not due or not reference.held_out or seen.rows < LEAST_ROWS:
            return grown, {}
        rest = None if seen.rows >= ENOUGH_ROWS else seen
        return replace(grown, seen=rest, tested_s=now_s), verdict(reference, seen)
