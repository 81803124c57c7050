"""Where all workers of a synchronous training meet: each brings something, all get what becomes of it."""

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from streaming.errors import ServiceError

Brought = TypeVar("Brought")
Result = TypeVar("Result")

KEEP_ALIVE_S = 5.0


class BrokenError(ServiceError):
    """The others cannot come any more; the text says who and why."""


class Rendezvous(Generic[Brought, Result]):
    """Meetings of `n` workers, one after the other; a broken one stays broken."""

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
        """Wait for all others; what they brought is combined once, in the workers' order.

        Args:
            waiting: called every few seconds with the time waited and the workers that are missing; what it raises ends
                the wait.

        Raises:
            BrokenError: somebody broke it; what `combine` raises breaks it, too.
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
            # Those who wait cannot bring anything to the next meeting before they have read what came of this one.
            return self._result

    def break_off(self, why: str) -> None:
        """End the wait of all who are here, and of all who will come."""
        with self._condition:
            self._break(why)

    def _break(self, why: str) -> None:
        self._why = self._why or why
        self._condition.notify_all()

    def _check(self) -> None:
        if self._why is not None:
            raise BrokenError(self._why)
