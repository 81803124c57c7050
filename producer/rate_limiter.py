"""A rate limiter that spaces events evenly."""

import time
from collections.abc import Callable

from producer.errors import PublishError

LATENESS_S = 0.25  # delay that is made up for; after a longer one the schedule restarts, so that no burst follows


class RateLimiter:
    """Limits events to `rate` per second, evenly spaced.

    Args:
        rate: events per second; None for no limit.
        clock: returns the time in seconds.
        sleep: waits for a number of seconds.
    """

    def __init__(
        self,
        rate: float | None,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        """Raises PublishError if the rate is not positive."""
        if rate is not None and not rate > 0:
            raise PublishError(f"rate: expected a positive number of images per second, got {rate:g}")
        self._interval_s = 1 / rate if rate else 0.0
        self._clock = clock
        self._sleep = sleep
        self._next: float | None = None

    def wait(self) -> None:
        """Return when the next event is due."""
        if not self._interval_s:
            return
        now = self._clock()
        due = now if self._next is None else max(self._next, now - LATENESS_S)
        if due > now:
            self._sleep(due - now)
        self._next = due + self._interval_s
