"""Paired measurements of ours and a peer, alternating, so that drift of the machine affects both."""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from time import perf_counter

RUNS = 5


@dataclass(frozen=True)
class Pair:
    """The result of one benchmark: units of work per second of both, by run."""

    question: str
    unit: str
    aim: float  # of the ratio
    ours: list[float]
    peer: list[float]
    less_is_better: bool = False  # for seconds or megabytes: the ratio is peer / ours

    @property
    def ratios(self) -> list[float]:
        """The ratio of each pair; above 1 if ours is better."""
        pairs = zip(self.ours, self.peer, strict=True)
        return [peer / ours if self.less_is_better else ours / peer for ours, peer in pairs]

    @property
    def ratio(self) -> float:
        """The median ratio."""
        return median(self.ratios)

    @property
    def spread(self) -> tuple[float, float]:
        return min(self.ratios), max(self.ratios)


def pair(
    question: str, unit: str, aim: float, work: int, ours: Callable[[], object], peer: Callable[[], object]
) -> Pair:
    """Time both `RUNS` times after one warm-up each.

    Args:
        aim: the required ratio.
        work: the number of units per call.
    """
    ours()
    peer()
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(RUNS):
        for call, took in zip((ours, peer), seconds, strict=True):
            clock = perf_counter()
            call()
            took.append(perf_counter() - clock)
    return Pair(question, unit, aim, [work / took for took in seconds[0]], [work / took for took in seconds[1]])
