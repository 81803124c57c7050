"""The store in a local folder.

An object is written under a temporary name, synced, and linked to its own name, which fails if that name exists.
"""

import io
import os
import shutil
import stat
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, cast

from streaming.errors import DamagedError, NotFoundError
from streaming.storage.store_base import Output, Store, Stored, check_key, local_errors, replaced_when_complete


class LocalStore(Store):
    """A folder. Before `create` and `put` return, the object and its name have been synced to disk."""

    def __init__(self, root: Path) -> None:
        super().__init__(str(root))
        self._root = root

    def get(self, key: str) -> bytes | None:
        path = self._path(key)
        with local_errors("read", path):
            try:
                # Without O_NONBLOCK, opening a pipe would block until another process writes to it.
                descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            except (FileNotFoundError, NotADirectoryError):
                return None
            mode = os.fstat(descriptor).st_mode
            if stat.S_ISREG(mode):
                with open(descriptor, "rb") as file:  # noqa: PTH123
                    return file.read()
            os.close(descriptor)
        if stat.S_ISDIR(mode):
            return None
        raise DamagedError(f"{path} should be a regular file, but is a pipe, socket or device: remove it")

    def head(self, key: str, n: int) -> bytes | None:
        path = self._path(key)
        with local_errors("read", path):
            if not path.is_file():
                return None
            with path.open("rb") as file:
                return file.read(n)

    def size(self, key: str) -> int | None:
        path = self._path(key)
        with local_errors("read", path):
            return path.stat().st_size if path.is_file() else None

    def _put_if_absent(self, key: str, data: bytes) -> bool:
        path = self._path(key)
        with local_errors("write", path), _written(path, data) as temporary:
            try:
                os.link(temporary, path)
            except FileExistsError:
                return False
            _sync_folder(path.parent)
        return True

    def put(self, key: str, data: bytes) -> None:
        path = self._path(key)
        with local_errors("write", path), _written(path, data) as temporary:
            temporary.replace(path)
            _sync_folder(path.parent)

    def list(self, prefix: str = "") -> Iterator[Stored]:
        return self._below(self._folder(prefix), prefix)

    def _below(self, folder: Path, prefix: str) -> Iterator[Stored]:
        for entry in _entries(folder):
            key = f"{prefix}/{entry.name}" if prefix else entry.name
            try:
                if entry.is_dir():
                    yield from self._below(folder / entry.name, key)
                    continue
                status = entry.stat()
            except FileNotFoundError:  # deleted in the meantime
                continue
            yield Stored(key, status.st_size, datetime.fromtimestamp(status.st_mtime, UTC))

    def folders(self, prefix: str = "") -> Sequence[str]:
        return sorted(entry.name for entry in _entries(self._folder(prefix)) if entry.is_dir())

    def delete(self, keys: Iterable[str]) -> None:
        for path in [self._path(key) for key in keys]:
            with local_errors("delete", path), suppress(FileNotFoundError, NotADirectoryError):
                path.unlink()

    def open_output(self, key: str) -> BinaryIO:
        path = self._path(key)
        with local_errors("write", path):
            _make_folder(path.parent)
            # Written under its final name, so that the file of a killed process is vacuumed with its table.
            return cast("BinaryIO", Output(_SyncedFile(path, "xb")))

    def fetch(self, key: str, to: Path) -> None:
        path = self._path(key)
        with replaced_when_complete(to) as temporary:
            with local_errors("write", to):
                temporary.touch()
            with local_errors("read", path):
                try:
                    shutil.copyfile(path, temporary)
                except FileNotFoundError as error:
                    raise NotFoundError(f"{path} does not exist") from error

    def _path(self, key: str) -> Path:
        return self._root / check_key(key)

    def _folder(self, prefix: str) -> Path:
        return self._path(prefix) if prefix else self._root


class _SyncedFile(io.FileIO):
    """A new file that is synced to disk when it is closed, hence before any commit refers to it."""

    def close(self) -> None:
        if not self.closed:
            try:
                os.fsync(self.fileno())
            finally:
                super().close()

    def discard(self) -> None:
        super().close()
        Path(os.fsdecode(self.name)).unlink(missing_ok=True)


def _entries(folder: Path) -> Sequence[os.DirEntry[str]]:
    """The entries of a folder, without files that are being written; empty if the folder does not exist."""
    with local_errors("list", folder), suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        return [entry for entry in entries if not entry.name.startswith(".")]
    return []


@contextmanager
def _written(path: Path, data: bytes) -> Iterator[Path]:
    """A synced temporary file with `data`, next to `path`; listings do not show it."""
    temporary = path.with_name(f".{uuid.uuid4().hex}.part")
    _make_folder(path.parent)
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _make_folder(folder: Path) -> None:
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
