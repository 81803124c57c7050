"""Debouncing of changed files: a file is passed on once it has stopped changing."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from producer.published_files import FileState

QUIET_S = 1.0
MAX_WAITING = 100_000  # names; any beyond it are found by the next full scan


@dataclass(slots=True)
class _Waiting:
    state: FileState | None
    due: float


class Debouncer:
    """Changed files that wait until they are complete; `clock` returns the time in seconds.

    A file is complete when its size and modification time have been stable for `QUIET_S` and it is not empty.

    Attributes:
        overflowed: files were dropped because more than `MAX_WAITING` waited.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.overflowed = False
        self._clock = clock
        self._waiting: dict[str, _Waiting] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, name: str, delay_s: float = QUIET_S) -> None:
        """Add a file that appeared or changed, to be checked after `delay_s` seconds."""
        if name in self._waiting:
            return
        if len(self._waiting) >= MAX_WAITING:
            self.overflowed = True
        else:
            self._waiting[name] = _Waiting(_state(name), self._clock() + delay_s)

    def complete(self) -> Iterator[tuple[str, FileState]]:
        """Remove and yield the files that are complete; deleted files are dropped."""
        now = self._clock()
        for name in [name for name, waiting in self._waiting.items() if waiting.due <= now]:
            state = _state(name)
            if state is None:
                del self._waiting[name]
            elif state == self._waiting[name].state and state.size:
                del self._waiting[name]
                yield name, state
            elif state.size:
                self._waiting[name] = _Waiting(state, now + QUIET_S)
            else:  # empty: its first bytes will be another event
                del self._waiting[name]


def _state(name: str) -> FileState | None:
    try:
        return FileState.of(name)
    except OSError:
        return None
