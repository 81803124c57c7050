"""What processes share of the home: its directories, and the locks that keep two from doing one thing at once."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from streaming.errors import ServiceError


def make_dir(path: Path) -> Path:
    """Make the directory, and those above it, if it is not there yet.

    Raises:
        ServiceError: it cannot be made, or not be written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".writable"
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise ServiceError(
            f"cannot write to {path} ({error.strerror}): choose another home with --home DIR or IMAGESTREAM_HOME"
        ) from error
    return path


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path` in a directory that is there; wait for another process that holds it.

    The kernel releases the lock with the process that holds it, so that one left behind never blocks.
    """
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def held(path: Path, busy: str) -> Iterator[None]:
    """As `locked`, but refuse with `busy` instead of waiting.

    Raises:
        ServiceError: another process holds the lock.
    """
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ServiceError(busy) from error
        yield
