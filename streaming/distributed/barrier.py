"""The barrier of a synchronous training: all workers contribute a value and receive the combined result."""

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from streaming.errors import ServiceError

Contribution = TypeVar("Contribution")
Result = TypeVar("Result")

KEEP_ALIVE_S = 5.0


class BrokenError(ServiceError):
    """The barrier is broken; the message says which worker is lost and why."""


class Barrier(Generic[Contribution, Result]):
    """A reusable barrier of `n` workers; once broken it stays broken."""

    def __init__(self, n: int) -> None:
        self._n = n
        self._condition = threading.Condition()
        self._contributions: dict[int, Contribution] = {}
        self._round = 0
        self._result: Result
        self._why: str | None = None

    def wait(
        self,
        worker: int,
        contribution: Contribution,
        combine: Callable[[list[Contribution]], Result],
        waiting: Callable[[float, list[int]], None],
    ) -> Result:
        """Wait for all other workers and return the combined result.

        Args:
            contribution: its contribution.
            combine: combines the contributions in the order of the workers; called once per round.
            waiting: called every few seconds with the time waited in seconds and the missing workers; an exception ends
                the wait.

        Raises:
            BrokenError: the barrier is broken, which an exception of `combine` causes, too.
        """
        with self._condition:
            self._check()
            self._contributions[worker] = contribution
            if len(self._contributions) == self._n:
                try:
                    self._result = combine([self._contributions[one] for one in sorted(self._contributions)])
                except Exception as error:
                    self._abort(str(error))
                    raise
                self._contributions = {}
                self._round += 1
                self._condition.notify_all()
                return self._result
            here, waited = self._round, 0.0
            while not self._condition.wait_for(lambda: self._round != here or self._why, KEEP_ALIVE_S):
                waited += KEEP_ALIVE_S
                waiting(waited, [one for one in range(self._n) if one not in self._contributions])
            if self._round == here:
                self._check()
            # The result cannot change before all waiting workers have read it: they do not contribute to the next
            # round.
            return self._result

    def abort(self, why: str) -> None:
        """Break the barrier for all current and future workers."""
        with self._condition:
            self._abort(why)

    def _abort(self, why: str) -> None:
        self._why = self._why or why
        self._condition.notify_all()

    def _check(self) -> None:
        if self._why is not None:
            raise BrokenError(self._why)
