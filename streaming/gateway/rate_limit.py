"""How many requests are taken in a minute: of an address, with an API key, and of all together; token buckets.

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

MAX_BUCKETS = 10_000  # that are kept; the one that was not used for longest is forgotten


def address_of(request: Request) -> str:
    """The address that a request comes from; one name for the network of a single host."""
    return network_of(request.client.host if request.client else "")


def key_of(request: Request) -> str:
    """Which API key a request was let in with; to be asked after `access`."""
    return str(getattr(request.state, "api_key", ""))


class RateLimit:
    """The buckets of one gateway.

    Args:
        per_minute: requests in a minute that one bucket allows; 0 for no limit.
        bucket_of: the name of a request's bucket.
        of: what a bucket is for, in the refusal.
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
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # tokens, and when there were so many

    async def __call__(self, request: Request) -> None:
        """FastAPI dependency: lets a request pass, or raises 429 with the seconds to wait.

        A coroutine, so that FastAPI calls it on the event loop, one request after the other.
        """
        wait_s = self.take(self._bucket_of(request))
        if wait_s > 0:
            raise too_many(f"too many requests {self._of}: at most {self._capacity:.0f} a minute", ceil(wait_s))

    def take(self, bucket: str) -> float:
        """Take a token of a bucket; the seconds until there will be one, 0 if there was."""
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
