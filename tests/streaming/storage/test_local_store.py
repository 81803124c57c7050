"""The store in a local folder: what it syncs and closes, its errors, and other processes in the same folder."""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from streaming.storage.store import open_store
from streaming.storage.store_errors import StoreAwayError


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The files and folders synced to disk, with the sizes of the files; temporary files as `.part`."""
    found: list[tuple[str, int]] = []

    def record(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        found.append((path.suffix or path.name, 0 if path.is_dir() else path.stat().st_size))

    monkeypatch.setattr(os, "fsync", record)
    return found


def opened_below(folder: Path) -> list[Path]:
    """The files and folders that this process has open."""
    found = []
    for link in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # of this listing itself
            found.append(link.readlink())
    return [path for path in found if path.is_relative_to(folder)]


def test_files_and_their_folders_are_synced_and_closed(tmp_path: Path, synced: list[tuple[str, int]]) -> None:
    root, store = tmp_path / "root", open_store(tmp_path / "root")
    root.mkdir()
    assert store.create("a/b/c", b"one")
    assert synced == [("root", 0), ("a", 0), (".part", 3), ("b", 0)]
    synced.clear()
    store.put("a/b/c", b"three")
    assert synced == [(".part", 5), ("b", 0)]
    synced.clear()
    with store.open_output("a/b/d") as output:
        output.write(b"four")
    assert synced == [("d", 4)]
    assert store.get("a") is None
    assert not opened_below(root)


def test_no_temporary_file_remains(tmp_path: Path) -> None:
    store = open_store(tmp_path / "home")
    assert store.create("one", b"first")
    assert not store.create("one", b"second")
    store.put("one", b"third")
    store.fetch("one", tmp_path / "copy")
    store.open_output("two").close()
    (tmp_path / "home" / "folder").mkdir()
    with pytest.raises(StoreAwayError):
        store.put("folder", b"")
    assert {path.name for path in tmp_path.rglob("*")} == {"home", "one", "two", "folder", "copy"}


def test_unreadable_or_unwritable_key_is_reported_with_its_path(tmp_path: Path) -> None:
    store, key = open_store(tmp_path), "a" * 300  # longer than a file's name may be
    calls: list[tuple[str, Callable[[], Any]]] = [
        *(("read", call) for call in (lambda: store.get(key), lambda: store.head(key, 1), lambda: store.size(key))),
        *(("write", call) for call in (lambda: store._put_if_absent(key, b""), lambda: store.put(f"{key}/b", b""))),
        ("write", lambda: store.open_output(key)),
        ("delete", lambda: store.delete([key])),
        ("read", lambda: store.fetch(key, tmp_path / "to")),
        *(("list", call) for call in (lambda: list(store.list(key)), lambda: store.folders(key))),
    ]
    for verb, call in calls:
        with pytest.raises(StoreAwayError, match=rf"cannot {verb} {tmp_path}/{key}.*: File name too long"):
            call()


def test_listing_omits_files_deleted_meanwhile(tmp_path: Path) -> None:
    for number in range(20):
        (tmp_path / f"gone-{number}").symlink_to(tmp_path / "nothing")
        (tmp_path / f"here-{number}").touch()
        (tmp_path / f"folder-{number}").mkdir()
    found = sorted(one.key for one in open_store(tmp_path).list())
    assert found == sorted(f"here-{number}" for number in range(20))


def test_folder_may_be_created_by_another_process_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    store, missing, is_dir = open_store(tmp_path), [tmp_path / "a"], Path.is_dir

    def not_yet(path: Path) -> bool:
        if path in missing:
            missing.remove(path)
            return False
        return is_dir(path)

    monkeypatch.setattr(Path, "is_dir", not_yet)
    store.put("a/b", b"one")
    assert missing == []
