"""A steady rate, on a clock that the test moves."""

import pytest

from producer.errors import PublishError
from producer.pace import LATENESS_S, Pace


class Clock:
    """Time that passes only while something sleeps, or when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_messages_are_evenly_spaced_and_none_waits_for_the_first() -> None:
    clock = Clock()
    pace = Pace(4, clock=clock, sleep=clock.sleep)
    times = []
    for _ in range(9):
        pace.wait()
        times.append(clock.now - 100)
        clock.sleep(0.1)  # what is done between takes less than there is
    assert times == pytest.approx([number / 4 for number in range(9)])


def test_after_a_delay_the_schedule_begins_anew_and_no_burst_follows() -> None:
    clock = Clock()
    pace = Pace(100, clock=clock, sleep=clock.sleep)
    pace.wait()
    clock.sleep(60)
    sent = 0
    until = clock.now + 1
    while clock.now < until:
        pace.wait()
        sent += 1
    assert sent <= 100 + 100 * LATENESS_S + 2


def test_a_small_delay_is_made_up_for_so_that_the_rate_holds() -> None:
    clock = Clock()
    pace = Pace(100, clock=clock, sleep=clock.sleep)
    for number in range(1000):
        pace.wait()
        clock.sleep(0.05 if number % 10 == 0 else 0.001)
    assert clock.now - 100 == pytest.approx(10, rel=0.02)


def test_without_a_rate_nothing_waits() -> None:
    clock = Clock()
    pace = Pace(None, clock=clock, sleep=clock.sleep)
    for _ in range(5):
        pace.wait()
    assert clock.now == 100


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan")])
def test_a_rate_that_is_none_is_refused(rate: float) -> None:
    with pytest.raises(PublishError, match="rate: expected images a second, above 0"):
        Pace(rate)
