"""How many requests an address may send: a token bucket for each.

A bucket holds the requests of a minute at most and is refilled evenly: a program may send them at once, and then one
whenever its share of a minute has passed.
"""

from collections import OrderedDict
from collections.abc import Callable
from math import ceil
from time import monotonic

from fastapi import Request

from streaming.gateway.connections import network_of
from streaming.gateway.problems import too_many

MAX_ADDRESSES = 10_000  # of which the buckets are kept; the one that has been silent longest is forgotten


class RateLimit:
    """The buckets of one gateway.

    Args:
        per_minute: requests that one address may send in a minute; 0 for no limit.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float] = monotonic) -> None:
        self._capacity = float(per_minute)
        self._clock = clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # tokens, and when there were so many

    async def __call__(self, request: Request) -> None:
        """FastAPI dependency: lets a request pass, or raises 429 with the seconds to wait.

        A coroutine, so that FastAPI calls it on the event loop, one request after the other.
        """
        address = network_of(request.client.host if request.client else "")
        wait_s = self.take(address)
        if wait_s > 0:
            raise too_many(f"too many requests: at most {self._capacity:.0f} a minute", ceil(wait_s))

    def take(self, address: str) -> float:
        """Take a token of an address; the seconds until there will be one, 0 if there was."""
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
