"""Validates the path of a home: all libraries that open its files must take the path literally."""

import re

MAX_PATH_BYTES = 3_500  # Linux allows 4,096, including the files in the home
REFUSED_CHARACTERS = {
    "[": "deltalake does not open",
    "]": "deltalake does not open",
    "%": "deltalake treats as an escape",
    "\\": "deltalake treats as a slash",
    "=": "DuckDB and Spark treat as a partition",
}


def invalid_reason(path: str) -> str | None:
    """Why a local path cannot be a home; None if it can."""
    if len(path.encode("utf-8", "surrogateescape")) > MAX_PATH_BYTES:
        return f"has more than {MAX_PATH_BYTES:,} bytes, too many for the files in it"
    if re.search("[\ud800-\udfff]", path):
        return "is not UTF-8"
    if re.search(r"[\x00-\x1f\x7f]", path):
        return "has a line break or another control character"
    for letter, why in REFUSED_CHARACTERS.items():
        if letter in path:
            return f"has a {letter} in its path, which {why}"
    return None
