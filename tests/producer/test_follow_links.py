"""By default, symbolic links in a watched folder do not publish files outside it."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from producer.folder_watcher import FolderWatcher


@contextmanager
def watched(folder: Path, *, follow_links: bool = False) -> Iterator[FolderWatcher]:
    stop = threading.Event()
    watcher = FolderWatcher([str(folder)], stop, follow_links=follow_links)
    try:
        yield watcher
    finally:
        stop.set()
        watcher.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder, outside = tmp_path / "watched", tmp_path / "outside"
    for place in (folder, outside):
        place.mkdir()
        (place / "photo.jpg").write_bytes(b"\xff\xd8\xff")
    (folder / "inside.jpg").symlink_to("photo.jpg")
    (folder / "secret.jpg").symlink_to(outside / "photo.jpg")
    (folder / "more").symlink_to(outside)
    (folder / "passwd").symlink_to("/etc/passwd")
    return folder


def names(watcher: FolderWatcher, folder: Path) -> set[str]:
    return {os.path.relpath(name, folder) for name in watcher.files()}


def test_links_out_of_a_watched_folder_are_followed_only_with_the_option(folder: Path) -> None:
    with watched(folder) as watcher:
        assert names(watcher, folder) == {"photo.jpg", "inside.jpg"}
    with watched(folder, follow_links=True) as watcher:
        assert names(watcher, folder) >= {"photo.jpg", "inside.jpg", "secret.jpg", "passwd", "more/photo.jpg"}


def test_link_created_later_is_not_followed(folder: Path, tmp_path: Path) -> None:
    with watched(folder) as watcher:
        (folder / "later.jpg").symlink_to(tmp_path / "outside" / "photo.jpg")
        (folder / "new.jpg").write_bytes(b"\xff\xd8\xff")
        seen: list[str] = []
        while not any(name.endswith("new.jpg") for name in seen):
            seen += watcher.changes()[0]
        assert not [name for name in seen if name.endswith("later.jpg")]


def test_link_to_a_folder_can_be_watched(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    with watched(tmp_path / "link") as watcher:
        assert names(watcher, tmp_path / "link") == {"photo.jpg", "inside.jpg"}
