"""Homes in local folders."""

from pathlib import Path

from streaming.storage.home import Home


def local_home(folder: Path | str) -> Home:
    """The home in a folder that contains `tables/`."""
    return Home(str(folder), Path(folder))
