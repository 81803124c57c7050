"""The cache of files that all homes of a user share, below XDG_CACHE_HOME or ~/.cache."""

import os
from pathlib import Path

FOLDER = "imagestream"


def cached(name: str, work: Path) -> Path:
    """The folder `name` of the user's cache, or of the work folder if it exists there or no cache is possible."""
    own = work / name
    if own.is_dir():
        return own
    cache = _cache()
    return own if cache is None else cache / name


def _cache() -> Path | None:
    """The user's cache; None if no folder can be created, as in a container whose only volume is the home."""
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    except RuntimeError:  # no home directory
        return None
    if not cache.is_absolute():  # to be ignored by the XDG Base Directory Specification
        return None
    there = next(folder for folder in (cache, *cache.parents) if folder.exists())
    return cache / FOLDER if there.is_dir() and os.access(there, os.W_OK | os.X_OK) else None
