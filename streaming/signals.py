"""Being told to stop.

A process with the id 1, as a container's first one, gets only signals that it handles: so SIGTERM is handled from the
start of every command.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt in the block, as SIGINT does: what is open is closed on the way out."""
    if threading.current_thread() is not threading.main_thread():  # only there can signals be handled
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class until_stopped(AbstractContextManager[None]):  # noqa: N801  reads as a statement, as `suppress` does
    """A block without an end of its own, which SIGINT or SIGTERM ends as it should end."""

    def __enter__(self) -> None:
        self._terminable = terminable()
        self._terminable.__enter__()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        self._terminable.__exit__(None, None, None)
        return kind is KeyboardInterrupt


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set, for as long as the block runs."""
    stop = threading.Event()
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
