"""The rate limiter, on a simulated clock."""

import pytest

from producer.errors import PublishError
from producer.rate_limiter import LATENESS_S, RateLimiter


class Clock:
    """A clock that advances only by `sleep`."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_events_are_evenly_spaced_and_the_first_does_not_wait() -> None:
    clock = Clock()
    limiter = RateLimiter(4, clock=clock, sleep=clock.sleep)
    times = []
    for _ in range(9):
        limiter.wait()
        times.append(clock.now - 100)
        clock.sleep(0.1)  # work that takes less than the interval
    assert times == pytest.approx([number / 4 for number in range(9)])


def test_no_burst_follows_a_long_delay() -> None:
    clock = Clock()
    limiter = RateLimiter(100, clock=clock, sleep=clock.sleep)
    limiter.wait()
    clock.sleep(60)
    sent = 0
    until = clock.now + 1
    while clock.now < until:
        limiter.wait()
        sent += 1
    assert sent <= 100 + 100 * LATENESS_S + 2


def test_short_delay_is_made_up_for() -> None:
    clock = Clock()
    limiter = RateLimiter(100, clock=clock, sleep=clock.sleep)
    for number in range(1000):
        limiter.wait()
        clock.sleep(0.05 if number % 10 == 0 else 0.001)
    assert clock.now - 100 == pytest.approx(10, rel=0.02)


def test_no_rate_means_no_waiting() -> None:
    clock = Clock()
    limiter = RateLimiter(None, clock=clock, sleep=clock.sleep)
    for _ in range(5):
        limiter.wait()
    assert clock.now == 100


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan")])
def test_invalid_rate_is_rejected(rate: float) -> None:
    with pytest.raises(PublishError, match="rate: expected a positive number of images per second"):
        RateLimiter(rate)
