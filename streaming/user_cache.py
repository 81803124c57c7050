"""What every home of a user needs alike, kept once: below XDG_CACHE_HOME, else ~/.cache."""

import os
from pathlib import Path

FOLDER = "imagestream"


def cached(name: str, work: Path) -> Path:
    """The folder `name` of the user's cache; that of the work folder where it is there, or there can be no cache."""
    own = work / name
    if own.is_dir():
        return own
    cache = _cache()
    return own if cache is None else cache / name


def _cache() -> Path | None:
    """The user's cache; None where no folder can be made there, as in a container whose only volume is the home."""
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    except RuntimeError:  # no home directory
        return None
    if not cache.is_absolute():  # as the XDG Base Directory Specification has it
        return None
    there = next(folder for folder in (cache, *cache.parents) if folder.exists())
    return cache / FOLDER if there.is_dir() and os.access(there, os.W_OK | os.X_OK) else None
