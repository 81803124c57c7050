"""Handling of SIGINT and SIGTERM.

A process with the id 1, such as the first one in a container, only receives signals that it handles, so every command
handles SIGTERM from the start.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType


class Termination:
    """Handles SIGTERM by a KeyboardInterrupt.

    Attributes:
        received: whether the signal was received, even if another exception replaced KeyboardInterrupt.
        reported: whether this has been reported to the user.
    """

    def __init__(self) -> None:
        self.received = False
        self.reported = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        signal.default_int_handler(number, frame)


@contextmanager
def terminable() -> Iterator[Termination]:
    """Make SIGTERM raise KeyboardInterrupt in the block, like SIGINT, so that resources are released.

    Yields:
        The handler; nested blocks share it.
    """
    if threading.current_thread() is not threading.main_thread():  # only the main thread can handle signals
        yield Termination()
        return
    before = signal.getsignal(signal.SIGTERM)
    handler = before if isinstance(before, Termination) else Termination()
    signal.signal(signal.SIGTERM, handler)
    try:
        yield handler
    finally:
        signal.signal(signal.SIGTERM, before)


class until_stopped(AbstractContextManager[None]):  # noqa: N801  reads as a statement, as `suppress` does
    """A block that runs until SIGINT or SIGTERM, which end it without an error."""

    def __enter__(self) -> None:
        self._terminable = terminable()
        self._terminable.__enter__()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        self._terminable.__exit__(None, None, None)
        return kind is KeyboardInterrupt


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set while the block runs."""
    stop = threading.Event()
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
