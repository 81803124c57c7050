"""Rate limiters of the gateway, per client address, per API key and in total, with token buckets.

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

MAX_BUCKETS = 10_000  # the least recently used one is dropped


def address_of(request: Request) -> str:
    """The client address of a request, or the network of an IPv6 address."""
    return network_of(request.client.host if request.client else "")


def key_of(request: Request) -> str:
    """The number of the request's API key, after `access`."""
    return str(getattr(request.state, "api_key", ""))


class RateLimit:
    """The buckets of one gateway.

    Args:
        per_minute: the maximum number of requests of one bucket per minute; 0 for no limit.
        bucket_of: the name of a request's bucket.
        of: the requests of a bucket, for the error message.
        clock: in seconds.
    """

    def __init__(
        self,
        per_minute: int,
        bucket_of: Callable[[Request], str] = address_of,
        of: str = "from one address",
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._capacity = float(per_minute)
        self._bucket_of = bucket_of
        self._of = of
        self._clock = clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # tokens, and the time of that count

    async def __call__(self, request: Request) -> None:
        """Accept a request as a FastAPI dependency, or raise 429 with the seconds to wait.

        It is a coroutine, so that FastAPI calls it on the event loop and no lock is needed.
        """
        wait_s = self.take(self._bucket_of(request))
        if wait_s > 0:
            raise too_many(f"too many requests {self._of}: at most {self._capacity:.0f} per minute", ceil(wait_s))

    def take(self, bucket: str) -> float:
        """Take a token of a bucket; returns the seconds until one is available, 0 if it was taken."""
        if self._capacity == 0:
            return 0.0
        now = self._clock()
        tokens, then = self._buckets.pop(bucket, (self._capacity, now))
        tokens = min(self._capacity, tokens + (now - then) * self._capacity / 60)
        passes = tokens >= 1
        self._buckets[bucket] = (tokens - passes, now)
        if len(self._buckets) > MAX_BUCKETS:
            self._buckets.popitem(last=False)
        return 0.0 if passes else (1 - tokens) * 60 / self._capacity
