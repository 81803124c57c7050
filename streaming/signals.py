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
    """Handles SIGINT and SIGTERM by a KeyboardInterrupt.

    The exception may be replaced (DuckDB raises a RuntimeError) or discarded (by Python, in a destructor), so the
    signal is recorded as well.

    Attributes:
        received: the last signal, None if there was none.
        reported: whether it has been reported to the user.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.reported = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        signal.default_int_handler(number, frame)

    @property
    def by_sigterm(self) -> bool:
        """Whether the last signal was SIGTERM."""
        return self.received == signal.SIGTERM

    def wait(self, seconds: float) -> None:
        """Wait until a signal arrives, also one that arrived earlier.

        Raises:
            KeyboardInterrupt: a signal arrived.
        """
        if self.received is None:
            threading.Event().wait(seconds)  # which a signal ends by its exception
        else:
            raise KeyboardInterrupt


@contextmanager
def terminable() -> Iterator[Termination]:
    """Make SIGINT and SIGTERM raise KeyboardInterrupt in the block, so that resources are released.

    SIGINT stays ignored in a process that was started so, as by `nohup` or in the background of a script.

    Yields:
        The handler; nested blocks share it.
    """
    if threading.current_thread() is not threading.main_thread():  # only the main thread can handle signals
        yield Termination()
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    current = before[signal.SIGTERM]
    handler = current if isinstance(current, Termination) else Termination()
    signal.signal(signal.SIGTERM, handler)
    if before[signal.SIGINT] is signal.default_int_handler:
        signal.signal(signal.SIGINT, handler)
    try:
        yield handler
    finally:
        for number, one in before.items():
            signal.signal(number, one)


class until_stopped(AbstractContextManager[Termination]):  # noqa: N801  reads as a statement, as `suppress` does
    """A block that runs until SIGINT or SIGTERM, which end it without an error."""

    def __enter__(self) -> Termination:
        self._terminable = terminable()
        self._handler = self._terminable.__enter__()
        return self._handler

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        self._terminable.__exit__(None, None, None)
        received, self._handler.received = self._handler.received, None
        if kind is None:
            return False
        return kind is KeyboardInterrupt or (received is not None and issubclass(kind, Exception))


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set while the block runs."""
    stop = threading.Event()

    def request(*_: object) -> None:
        # In another thread: the handler may interrupt a call of the event's methods, which hold its lock.
        threading.Thread(target=stop.set, daemon=True).start()

    before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
