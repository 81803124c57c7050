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

    @property
    def ratio(self) -> float:
        """The median of the ratios, pair by pair."""
        return median(ours / peer for ours, peer in zip(self.ours, self.peer, strict=True))

    @property
    def spread(self) -> tuple[float, float]:
        ratios = [ours / peer for ours, peer in zip(self.ours, self.peer, strict=True)]
        return min(ratios), max(ratios)


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
