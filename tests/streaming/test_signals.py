"""Signals end a block or a command, even if the interrupt is discarded or replaced by another error."""

import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from streaming.cli.app import EXIT_INTERRUPTED
from streaming.pipeline import status
from streaming.signals import stop_signals, until_stopped
from tests.conftest import command_here

both = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])


@pytest.fixture(autouse=True)
def default_handler() -> Iterator[None]:
    """Python's handler of SIGINT, which PySpark replaces in a process with a session."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupted_query(number: int) -> None:
    """As DuckDB reports a signal during a query."""
    try:
        signal.raise_signal(number)
    except KeyboardInterrupt:
        raise RuntimeError("Query interrupted") from None


@both
def test_discarded_interrupt_ends_the_next_wait(number: int) -> None:
    steps = []
    with until_stopped() as stop:
        with suppress(KeyboardInterrupt):  # as Python does in a destructor
            signal.raise_signal(number)
        steps.append("discarded")
        stop.wait(300)
        steps.append("waited")
    assert steps == ["discarded"]


@both
def test_replaced_interrupt_ends_the_block_without_an_error(number: int) -> None:
    with until_stopped():
        interrupted_query(number)


@both
def test_replaced_interrupt_ends_a_command_as_interrupted(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status, "read_status", lambda _: interrupted_query(number))
    code, _, err = command_here("--home", tmp_path, "status")
    assert code == EXIT_INTERRUPTED
    assert "Traceback" not in err
    assert ("stopped by SIGTERM" in err) == (number == signal.SIGTERM)


def test_other_errors_are_raised_also_after_a_stopped_block() -> None:
    with until_stopped() as stop:
        signal.raise_signal(signal.SIGINT)
    assert stop.received is None
    with pytest.raises(RuntimeError, match="another"), until_stopped():
        raise RuntimeError("another error")


def test_ignored_interrupt_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    reached = False
    with until_stopped():
        signal.raise_signal(signal.SIGINT)
        reached = True
    assert reached


def test_signal_during_a_call_of_the_event_does_not_block() -> None:
    with stop_signals() as stop:
        with stop._cond:  # held within `wait`
            signal.raise_signal(signal.SIGINT)
        assert stop.wait(300)
