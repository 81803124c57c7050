"""Local copies of the files of tables in a bucket, for readers that take paths.

A file of a table never changes, so that a copy is as good as the file. Fetching whole files, several at a time, takes a
fraction of what DuckDB spends on ranges of remote files: one request per file instead of ten.

The copies are in the work folder of the home, which several processes may share. The copies that were used least
recently are deleted when there are too many of them; none that was used within the last minutes.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from time import time

from streaming.errors import ConfigurationError
from streaming.storage.home import Home

CACHE = "cache"
CACHE_BYTES = 4 * 1024**3
FETCHED_AT_A_TIME = 16
IN_USE_S = 1_800.0  # longer than any question takes


def local_copies(home: Home, files: Sequence[str]) -> list[str]:
    """The paths of files of the home's tables: of a local home the files themselves.

    Args:
        files: as `data_files` gives them.

    Raises:
        ServiceError: a file does not exist; a StoreAwayError where the store does not answer.
    """
    if home.is_local:
        return list(files)
    folder = home.work / CACHE
    keys = [file.removeprefix(f"{home.uri}/") for file in files]
    paths = [folder / key for key in keys]
    missing = [(key, path) for key, path in zip(keys, paths, strict=True) if not _used(path)]
    if missing:
        with ThreadPoolExecutor(FETCHED_AT_A_TIME) as pool:
            list(pool.map(lambda one: _fetch(home, *one), missing))
        _shrink(folder)
    return [str(path) for path in paths]


def _used(path: Path) -> bool:
    """Whether the copy exists; it is marked as used now."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


def _fetch(home: Home, key: str, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(
            f"cannot write to {path.parent} ({error.strerror}): choose another work folder with IMAGESTREAM_WORK"
        ) from error
    home.store.fetch(key, path)


def _shrink(folder: Path) -> None:
    """Delete the copies used least recently, until the others fit."""
    found = sorted(_copies(folder), reverse=True)
    total = 0
    for used, size, path in found:
        total += size
        if total > CACHE_BYTES and time() - used > IN_USE_S:
            Path(path).unlink(missing_ok=True)


def _copies(folder: Path) -> Iterable[tuple[float, int, str]]:
    """(when it was used, bytes, path) of every copy."""

    def walk(place: str) -> Iterator[tuple[float, int, str]]:
        with suppress(FileNotFoundError), os.scandir(place) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    yield from walk(entry.path)
                else:
                    with suppress(FileNotFoundError):  # deleted by another process since
                        status = entry.stat(follow_symlinks=False)
                        yield status.st_mtime, status.st_size, entry.path

    return walk(str(folder))
