"""A local cache of the files of tables in a bucket, for readers that need paths.

A file of a table never changes, so a copy stays valid. Fetching whole files in parallel takes one request per file,
where DuckDB's reads of ranges of remote files take about ten.

The cache is in the work folder of the home and can be shared by processes. If it is too large, the least recently used
copies are deleted, except those used within the last `IN_USE_S` seconds.
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
IN_USE_S = 1_800.0  # longer than any query takes


def local_copies(home: Home, files: Sequence[str]) -> list[str]:
    """Local paths of files of the home's tables; for a local home, the files themselves.

    Args:
        home: of the tables.
        files: from `data_files`.

    Raises:
        ServiceError: a file does not exist.
        StoreAwayError: the store does not answer.
    """
    if home.is_local:
        return list(files)
    folder = home.work / CACHE
    keys = [file.removeprefix(f"{home.uri}/") for file in files]
    paths = [folder / key for key in keys]
    missing = [(key, path) for key, path in zip(keys, paths, strict=True) if not _touch_if_present(path)]
    if missing:
        with ThreadPoolExecutor(FETCHED_AT_A_TIME) as pool:
            list(pool.map(lambda one: _fetch(home, *one), missing))
        _shrink(folder)
    return [str(path) for path in paths]


def _touch_if_present(path: Path) -> bool:
    """Whether the copy exists; if so, mark it as used now."""
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
    """Delete the least recently used copies until the rest fits."""
    found = sorted(_copies(folder), reverse=True)
    total = 0
    for used, size, path in found:
        total += size
        if total > CACHE_BYTES and time() - used > IN_USE_S:
            Path(path).unlink(missing_ok=True)


def _copies(folder: Path) -> Iterable[tuple[float, int, str]]:
    """(time of the last use, bytes, path) of every copy."""

    def walk(place: str) -> Iterator[tuple[float, int, str]]:
        with suppress(FileNotFoundError), os.scandir(place) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    yield from walk(entry.path)
                else:
                    with suppress(FileNotFoundError):  # deleted by another process in the meantime
                        status = entry.stat(follow_symlinks=False)
                        yield status.st_mtime, status.st_size, entry.path

    return walk(str(folder))
