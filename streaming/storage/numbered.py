"""Numbered objects of a folder, such as decisions, versions and moves: FOLDER/00000007.json."""

import re
from collections.abc import Iterator

from streaming.storage.store import Store, Stored


def numbered_key(folder: str, number: int, width: int) -> str:
    """The key of an object, its number padded with zeros to `width` digits."""
    return f"{folder}/{number:0{width}}.json"


def numbered(store: Store, folder: str, width: int) -> Iterator[tuple[int, Stored]]:
    """The numbered objects directly in a folder, in no particular order; other objects are ignored."""
    for stored in store.list(folder):
        match = re.fullmatch(r"([0-9]+)\.json", stored.key.removeprefix(f"{folder}/"))
        if match and int(match[1]) > 0 and stored.key == numbered_key(folder, int(match[1]), width):
            yield int(match[1]), stored
