"""The barrier of a synchronous training: all workers contribute a value and receive the combined result."""

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from streaming.errors import ServiceError

Brought = TypeVar("Brought")
Result = TypeVar("Result")

KEEP_ALIVE_S = 5.0


class BrokenError(ServiceError):
    """The barrier is broken; the message says which worker is lost and why."""


class Barrier(Generic[Brought, Result]):
    """A reusable barrier of `n` workers; once broken it stays broken."""

    def __init__(self, n: int) -> None:
        self._n = n
        self._condition = threading.Condition()
        self._brought: dict[int, Brought] = {}
        self._round = 0
        self._result: Result
        self._why: str | None = None

    def meet(
        self,
        worker: int,
        brought: Brought,
        combine: Callable[[list[Brought]], Result],
        waiting: Callable[[float, list[int]], None],
    ) -> Result:
        """Wait for all other workers and return the combined result.

        Args:
            brought: its contribution.
            combine: combines the contributions in the order of the workers; called once per round.
            waiting: called every few seconds with the time waited in seconds and the missing workers; an exception ends
                the wait.

        Raises:
            BrokenError: the barrier is broken, which an exception of `combine` causes, too.
        """
        with self._condition:
            self._check()
            self._brought[worker] = brought
            if len(self._brought) == self._n:
                try:
                    self._result = combine([self._brought[one] for one in sorted(self._brought)])
                except Exception as error:
                    self._break(str(error))
                    raise
                self._brought = {}
                self._round += 1
                self._condition.notify_all()
                return self._result
            here, waited = self._round, 0.0
            while not self._condition.wait_for(lambda: self._round != here or self._why, KEEP_ALIVE_S):
                waited += KEEP_ALIVE_S
                waiting(waited, [one for one in range(self._n) if one not in self._brought])
            if self._round == here:
                self._check()
            # The result cannot change before all waiting workers have read it: they do not contribute to the next
            # round.
            return self._result

    def break_off(self, why: str) -> None:
        """Break the barrier for all current and future workers."""
        with self._condition:
            self._break(why)

    def _break(self, why: str) -> None:
        self._why = self._why or why
        self._condition.notify_all()

    def _check(self) -> None:
        if self._why is not None:
            raise BrokenError(self._why)
