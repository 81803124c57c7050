"""Watching folders for files to publish: listing them and following changes."""

import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from producer.errors import PublishError
from producer.walk import walk

MAX_CHANGES = 100_000  # names kept between two calls of `changes`
EVENT_MS = 200
TEMPORARY = (".part", ".partial", ".tmp", ".crdownload", ".download", ".filepart", "~")


class FolderWatcher:
    """Follows folders and their subfolders on a separate thread."""

    def __init__(self, folders: Sequence[str], stop: threading.Event, *, follow_links: bool = False) -> None:
        """Start following changes.

        Args:
            stop: ends the thread when it is set.
            follow_links: also publish files outside the folders that symbolic links in them point to. This is off by
                default because it lets anyone who may write to a folder publish any file that this process can read.

        Raises:
            PublishError: a path is not a folder or cannot be watched.
        """
        if not folders:
            raise PublishError("nothing to watch: expected at least one folder")
        for folder in folders:
            if not Path(folder).is_dir():
                what = "is a file" if Path(folder).exists() else "does not exist"
                raise PublishError(f"{folder}: expected a folder to watch, but it {what}")
        self._folders = folders
        # watchfiles reports absolute paths; files are published under the paths that the user gave.
        self._given = {os.path.abspath(folder): folder for folder in folders}  # noqa: PTH100
        self._given |= {os.path.realpath(folder): folder for folder in folders}
        self._inside = None if follow_links else tuple(os.path.realpath(folder) + os.sep for folder in folders)
        self._stop = stop
        self._lock = threading.Lock()
        self._changed: set[str] = set()
        self._overflowed = False
        self._error: BaseException | None = None
        self._following = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="watch", daemon=True)
        self._thread.start()
        self._following.wait()

    def files(self, folder: str | None = None) -> Iterator[str]:
        """Yield the names of all files, or of those below `folder`, unordered: there may be millions of them."""
        entered: set[str] = set()
        for start in self._folders if folder is None else (folder,):
            # Folders that cannot be listed are ignored: the next scan may succeed.
            yield from filter(self._is_included, walk(start, entered=entered, skip=_ignored, in_order=False))

    def changes(self) -> tuple[list[str], bool]:
        """Return the names created or changed since the last call, and whether any were dropped as too many.

        Raises:
            PublishError: the folders can no longer be watched.
        """
        with self._lock:
            changed, overflowed = self._changed, self._overflowed
            self._changed, self._overflowed = set(), False
        if self._error is not None:
            raise PublishError(f"the folders cannot be watched: {self._error}") from self._error
        named = filter(None, map(self._named, changed))
        return sorted(filter(self._is_included, named)), overflowed

    def close(self) -> None:
        """Wait for the thread to end; `stop` must be set."""
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
                yield_on_timeout=True,  # the first timeout shows that watching has begun
                raise_interrupt=False,
                ignore_permission_denied=True,
            ):
                self._following.set()
                with self._lock:
                    self._changed |= {path for change, path in changes if change is not Change.deleted}
                    if len(self._changed) > MAX_CHANGES:
                        self._changed, self._overflowed = set(), True
        except (OSError, RuntimeError) as error:  # watchfiles raises RuntimeError if the kernel has no watches left
            self._error = error
        finally:
            self._following.set()

    def _is_included(self, name: str) -> bool:
        """Whether a file may be published: links that lead outside the folders count only with `follow_links`."""
        return self._inside is None or os.path.realpath(name).startswith(self._inside)

    def _named(self, path: str) -> str | None:
        for absolute, given in self._given.items():
            if path.startswith(absolute + os.sep):
                below = path[len(absolute) + 1 :]
                return None if _ignored(below) else os.path.join(given, below)  # noqa: PTH118
        return None


def _ignored(name: str) -> bool:
    """Whether a name, or a path below a watched folder, is hidden or that of an unfinished copy.

    Copying programs write to such a name first and rename the file when it is complete.
    """
    return name.endswith(TEMPORARY) or any(part.startswith(".") for part in Path(name).parts)
