"""Files that are still being written: each waits until it has not changed for a moment."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from producer.seen import FileState

SETTLE_S = 1.0
MAX_WAITING = 100_000  # names; what does not fit is found again by the next look at the whole folder


@dataclass(slots=True)
class _Waiting:
    state: FileState | None
    due: float


class Settling:
    """Names of files, and since when each is as it is.

    A file counts as written when its size and the time of its last change stay as they are for `SETTLE_S`; an empty one
    is one that nobody has begun to write.

    Args:
        clock: gives the time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.overflown = False
        self._clock = clock
        self._waiting: dict[str, _Waiting] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def note(self, name: str, after_s: float = SETTLE_S) -> None:
        """A file that appeared or changed; it is looked at again after so many seconds."""
        if name in self._waiting:
            return
        if len(self._waiting) >= MAX_WAITING:
            self.overflown = True
        else:
            self._waiting[name] = _Waiting(_state(name), self._clock() + after_s)

    def settled(self) -> Iterator[tuple[str, FileState]]:
        """The files that are written, which wait no more; those that are gone are forgotten."""
        now = self._clock()
        for name in [name for name, waiting in self._waiting.items() if waiting.due <= now]:
            state = _state(name)
            if state is None:
                del self._waiting[name]
            elif state == self._waiting[name].state and state.size:
                del self._waiting[name]
                yield name, state
            elif state.size:
                self._waiting[name] = _Waiting(state, now + SETTLE_S)
            else:  # its first bytes will be an event
                del self._waiting[name]


def _state(name: str) -> FileState | None:
    try:
        return FileState.of(name)
    except OSError:
        return None
