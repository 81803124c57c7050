"""Stores that record their requests."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from streaming.storage.local_store import LocalStore
from streaming.storage.store import Store, Stored


class Elsewhere(Store):
    """A folder that is treated as remote, like a bucket.

    Attributes:
        asked: all requests, as (method, key or folder).
        unlisted: keys that are missing from listings.
    """

    def __init__(self, root: Path) -> None:
        super().__init__(f"s3://bucket{root}")
        self.asked: list[tuple[str, str]] = []
        self.unlisted: set[str] = set()
        self._inner = LocalStore(root)

    def get(self, key: str) -> bytes | None:
        self.asked.append(("get", key))
        return self._inner.get(key)

    def _put_if_absent(self, key: str, data: bytes) -> bool:
        self.asked.append(("create", key))
        return self._inner._put_if_absent(key, data)

    def head(self, key: str, n: int) -> bytes | None:
        self.asked.append(("head", key))
        return self._inner.head(key, n)

    def size(self, key: str) -> int | None:
        self.asked.append(("size", key))
        return self._inner.size(key)

    def put(self, key: str, data: bytes) -> None:
        self.asked.append(("put", key))
        self._inner.put(key, data)

    def list(self, prefix: str = "") -> Iterator[Stored]:
        self.asked.append(("list", prefix))
        return (stored for stored in self._inner.list(prefix) if stored.key not in self.unlisted)

    def folders(self, prefix: str = "") -> Sequence[str]:
        self.asked.append(("folders", prefix))
        return self._inner.folders(prefix)

    def delete(self, keys: Iterable[str]) -> None:
        self._inner.delete(keys)

    def open_output(self, key: str) -> BinaryIO:
        self.asked.append(("open_output", key))
        return self._inner.open_output(key)

    def fetch(self, key: str, to: Path) -> None:
        self.asked.append(("fetch", key))
        self._inner.fetch(key, to)
