"""Reads the configuration file, which has settings in TOML.

An unknown name is an error, since a misspelt setting would otherwise silently keep its default.
"""

import tomllib
from collections.abc import Collection
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from streaming.errors import UsageError
from streaming.storage.store import is_uri

DEFAULT_FILE = Path("imagestream.toml")  # in the working directory
MAX_BYTES = 64 * 1024


def read_config_file(file: Path, names: Collection[str], places: Collection[str]) -> dict[str, Any]:
    """The settings in a file, by name; relative paths are relative to the file.

    Args:
        file: TOML, at most MAX_BYTES.
        names: of all settings.
        places: the names of settings that are paths.

    Raises:
        ServiceError: the file cannot be read, is not valid TOML, or has a name that is not a setting.
    """
    try:
        with file.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise UsageError(f"configuration file {file} cannot be read: {error.strerror}") from error
    if len(content) > MAX_BYTES:
        raise UsageError(f"configuration file {file} is larger than {MAX_BYTES:,} bytes: expected a few settings")
    try:
        values = tomllib.loads(content.decode("utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"configuration file {file} is not valid TOML: {error}") from error
    for name in values:
        if name not in names:
            raise UsageError(f"{file}: there is no setting {name!r}, {nearest(name, names)}")
    return {name: _resolved(file, value) if name in places else value for name, value in values.items()}


def nearest(name: str, names: Collection[str]) -> str:
    """A suggestion for a misspelt name, or else the list of all names."""
    by_case = {one.lower(): one for one in names}
    close = [by_case[one] for one in get_close_matches(name.lower().replace("-", "_"), by_case, n=1)]
    return f"did you mean {close[0]}?" if close else f"there are: {', '.join(sorted(names))}"


def _resolved(file: Path, value: object) -> object:
    if not isinstance(value, str) or is_uri(value):  # other types are rejected by the setting itself
        return value
    return file.absolute().parent / Path(value).expanduser()
