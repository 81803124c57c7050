"""Ours and a peer in turn, A B A B …, so that a machine that drifts drifts for both."""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from time import perf_counter

RUNS = 5


@dataclass(frozen=True)
class Pair:
    """One question's answer: units of work per second of both, run by run."""

    question: str
    unit: str
    aim: float  # of the ratio
    ours: list[float]
    peer: list[float]
    less_is_better: bool = False  # seconds or megabytes: then the ratio is the peer's by ours

    @property
    def ratios(self) -> list[float]:
        """Pair by pair; above 1 is in our favour."""
        pairs = zip(self.ours, self.peer, strict=True)
        return [peer / ours if self.less_is_better else ours / peer for ours, peer in pairs]

    @property
    def ratio(self) -> float:
        """The median of the ratios."""
        return median(self.ratios)

    @property
    def spread(self) -> tuple[float, float]:
        return min(self.ratios), max(self.ratios)


def pair(
    question: str, unit: str, aim: float, work: int, ours: Callable[[], object], peer: Callable[[], object]
) -> Pair:
    """Time both `RUNS` times after one warm-up each; `work` is the number of units that a call does."""
    ours()
    peer()
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(RUNS):
        for call, took in zip((ours, peer), seconds, strict=True):
            clock = perf_counter()
            call()
            took.append(perf_counter() - clock)
    return Pair(question, unit, aim, [work / took for took in seconds[0]], [work / took for took in seconds[1]])
