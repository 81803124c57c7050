"""Watched folders: what lies in them and what changes in them, of that which somebody means to publish."""

import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from producer.errors import PublishError

MAX_CHANGES = 100_000  # names kept while nobody asks for them
EVENT_MS = 200
TEMPORARY = (".part", ".partial", ".tmp", ".crdownload", ".download", ".filepart", "~")


class Folders:
    """Folders with all their subfolders, followed by a thread of its own."""

    def __init__(self, folders: Sequence[str], stop: threading.Event, *, follow_links: bool = False) -> None:
        """Begin to follow the changes, which end when `stop` is set.

        Args:
            follow_links: also publish what symbolic links below the folders point to outside of them. Whoever may
                write to a folder could otherwise have any file published that this process may read.

        Raises:
            PublishError: one of them is no folder, or cannot be watched.
        """
        if not folders:
            raise PublishError("nothing to watch: expected at least one folder")
        for folder in folders:
            if not Path(folder).is_dir():
                what = "is a file" if Path(folder).exists() else "does not exist"
                raise PublishError(f"{folder}: expected a folder to watch, but it {what}")
        self._folders = folders
        # Changes are told by absolute names; what is published is named as it was given.
        self._given = {os.path.abspath(folder): folder for folder in folders}  # noqa: PTH100
        self._given |= {os.path.realpath(folder): folder for folder in folders}
        self._inside = None if follow_links else tuple(os.path.realpath(folder) + os.sep for folder in folders)
        self._stop = stop
        self._lock = threading.Lock()
        self._changed: set[str] = set()
        self._overflown = False
        self._error: BaseException | None = None
        self._following = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="watch", daemon=True)
        self._thread.start()
        self._following.wait()

    def files(self, folder: str | None = None) -> Iterator[str]:
        """The names of all files, below `folder` if it is given, in no order: a folder may hold a million of them."""
        seen: set[str] = set()
        for start in self._folders if folder is None else (folder,):
            yield from filter(self._wanted, _walk(start, seen))

    def changes(self) -> tuple[list[str], bool]:
        """The names that appeared or changed since this was last asked, and whether there were too many to keep.

        Raises:
            PublishError: the folders cannot be followed any longer.
        """
        with self._lock:
            changed, overflown = self._changed, self._overflown
            self._changed, self._overflown = set(), False
        if self._error is not None:
            raise PublishError(f"the folders cannot be watched: {self._error}") from self._error
        named = filter(None, map(self._named, changed))
        return sorted(filter(self._wanted, named)), overflown

    def close(self) -> None:
        """Wait for the end of the thread; `stop` must be set."""
        self._thread.join()

    def _follow(self) -> None:
        from watchfiles import Change, watch

        try:
            for changes in watch(
                *self._folders,
                watch_filter=None,
                stop_event=self._stop,
                debounce=EVENT_MS,
                rust_timeout=EVENT_MS,
                yield_on_timeout=True,  # the first time tells that it has begun
                raise_interrupt=False,
                ignore_permission_denied=True,
            ):
                self._following.set()
                with self._lock:
                    self._changed |= {path for change, path in changes if change is not Change.deleted}
                    if len(self._changed) > MAX_CHANGES:
                        self._changed, self._overflown = set(), True
        except (OSError, RuntimeError) as error:  # watchfiles raises RuntimeError where the kernel has no more watches
            self._error = error
        finally:
            self._following.set()

    def _wanted(self, name: str) -> bool:
        """Whether a file lies in a watched folder, wherever its links lead."""
        return self._inside is None or os.path.realpath(name).startswith(self._inside)

    def _named(self, path: str) -> str | None:
        for absolute, given in self._given.items():
            if path.startswith(absolute + os.sep):
                below = path[len(absolute) + 1 :]
                return os.path.join(given, below) if _meant(below) else None  # noqa: PTH118
        return None


def _walk(folder: str, seen: set[str]) -> Iterator[str]:
    real = os.path.realpath(folder)
    if real in seen:
        return
    seen.add(real)
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if not _meant(entry.name):
                    continue
                if entry.is_dir():
                    yield from _walk(entry.path, seen)
                elif entry.is_file():
                    yield entry.path
    except OSError:  # not to be read, or gone while it was: the next look may find it
        return


def _meant(name: str) -> bool:
    """Whether a name, or a path below the watched folder, is one to publish: not hidden, and not a download under way.

    Copying programs write to such a name first and rename the file when it is whole.
    """
    return not name.endswith(TEMPORARY) and not any(part.startswith(".") for part in Path(name).parts)
