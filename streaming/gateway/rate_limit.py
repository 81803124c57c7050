"""A rate limiter with a token bucket for each client address.

A bucket holds at most the requests of a minute and is refilled evenly, so a client may send them in a burst and then
continue at the average rate.
"""

from collections import OrderedDict
from collections.abc import Callable
from math import ceil
from time import monotonic

from fastapi import Request

from streaming.gateway.connections import network_of
from streaming.gateway.problems import too_many

MAX_ADDRESSES = 10_000  # with a bucket; the least recently used one is dropped


class RateLimit:
    """The buckets of one gateway.

    Args:
        per_minute: the maximum number of requests of one address per minute; 0 for no limit.
        clock: in seconds.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float] = monotonic) -> None:
        self._capacity = float(per_minute)
        self._clock = clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # tokens, and the time of that count

    async def __call__(self, request: Request) -> None:
        """Accept a request as a FastAPI dependency, or raise 429 with the seconds to wait.

        It is a coroutine, so that FastAPI calls it on the event loop and no lock is needed.
        """
        address = network_of(request.client.host if request.client else "")
        wait_s = self.take(address)
        if wait_s > 0:
            raise too_many(f"too many requests: at most {self._capacity:.0f} per minute", ceil(wait_s))

    def take(self, address: str) -> float:
        """Take a token of an address; returns the seconds until one is available, 0 if it was taken."""
        if self._capacity == 0:
            return 0.0
        now = self._clock()
        tokens, then = self._buckets.pop(address, (self._capacity, now))
        tokens = min(self._capacity, tokens + (now - then) * self._capacity / 60)
        passes = tokens >= 1
        self._buckets[address] = (tokens - passes, now)
        if len(self._buckets) > MAX_ADDRESSES:
            self._buckets.popitem(last=False)
        return 0.0 if passes else (1 - tokens) * 60 / self._capacity
