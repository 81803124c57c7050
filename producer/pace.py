"""A steady rate: one message at a time, evenly spaced."""

import time
from collections.abc import Callable

from producer.errors import PublishError

LATENESS_S = 0.25  # what is made up for after a delay; beyond it the schedule begins anew, so that no burst follows


class Pace:
    """Waits so that what follows happens `rate` times a second, evenly spaced.

    Args:
        rate: per second; None for as fast as it goes.
        clock: gives the time in seconds.
        sleep: waits for so many seconds.
    """

    def __init__(
        self,
        rate: float | None,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        """Raises PublishError if the rate is not above 0."""
        if rate is not None and not rate > 0:
            raise PublishError(f"rate: expected images a second, above 0, got {rate:g}")
        self._interval_s = 1 / rate if rate else 0.0
        self._clock = clock
        self._sleep = sleep
        self._next: float | None = None

    def wait(self) -> None:
        """Return when it is time for the next one."""
        if not self._interval_s:
            return
        now = self._clock()
        due = now if self._next is None else max(self._next, now - LATENESS_S)
        if due > now:
            self._sleep(due - now)
        self._next = due + self._interval_s
