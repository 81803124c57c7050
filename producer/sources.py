"""What to publish: files, folders and patterns become a list of regular files, each of them once."""

import glob
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from producer.errors import PublishError


class LabelFrom(StrEnum):
    """Where a file's label comes from: the name of the folder that it lies in, or nowhere."""

    PARENT = "parent"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A regular file to publish: its name as the user gave it (below a folder: joined to the folder), and its label."""

    name: str
    label: str | None


@dataclass(frozen=True, slots=True)
class Sources:
    """The files found, and what lies below a given folder but cannot be reached, as (name, reason).

    Attributes:
        files: a list, or files that come one by one and are not yet known.
    """

    files: Iterable[SourceFile]
    unreadable: list[tuple[str, str]] = field(default_factory=list)

    @property
    def total(self) -> int | None:
        """How many there are in all; None where that is not yet known."""
        return len(self.files) + len(self.unreadable) if isinstance(self.files, list) else None


def find_files(paths: Iterable[str | os.PathLike[str]], label_from: LabelFrom | str = LabelFrom.NONE) -> Sources:
    """Every regular file that `paths` name, in their order; within a folder or pattern sorted by name.

    A folder is taken with all its subfolders; hidden files are files like others, symbolic links are followed and their
    loops cut. A pattern (`*`, `?`, `[…]`, `**`) is expanded unless a file has that very name, and leaves out hidden
    files as a shell does. A file reached in two ways is listed once, under the first name. Pipes, sockets and devices
    below a folder are no files and are passed over.

    Raises:
        PublishError: no path was given, one does not exist or is no regular file, a folder holds no file, or a pattern
            matches nothing.
    """
    try:
        label_from = LabelFrom(label_from)
    except ValueError as error:
        raise PublishError(f"label_from: expected parent or none, got {label_from!r}") from error
    found: list[SourceFile] = []
    unreadable: list[tuple[str, str]] = []
    seen_files: set[str] = set()
    seen_folders: set[str] = set()
    for path in paths:
        for name in _expanded(os.fspath(path)):
            for file in _files_of(name, seen_folders, unreadable):
                real = os.path.realpath(file)
                if real not in seen_files:
                    seen_files.add(real)
                    found.append(SourceFile(file, label_of(file, label_from)))
    if not found and not unreadable:
        raise PublishError("nothing to publish: expected at least one file, folder or pattern")
    return Sources(found, unreadable)


def _expanded(path: str) -> list[str]:
    if os.path.lexists(path) or not glob.has_magic(path):
        return [path]
    matches = sorted(glob.glob(path, recursive=True))  # noqa: PTH207  Path.glob normalises the names
    if not matches:
        raise PublishError(f"{path}: the pattern matches nothing")
    return matches


def _files_of(name: str, seen_folders: set[str], unreadable: list[tuple[str, str]]) -> Iterator[str]:
    """The file `name` itself, or the files below the folder `name`."""
    path = Path(name)
    if path.is_file():
        yield name
    elif not path.is_dir():
        what = "is no regular file" if os.path.lexists(name) and path.exists() else "does not exist"
        raise PublishError(f"{name}: expected a file, a folder or a pattern, but it {what}")
    elif os.path.realpath(name) not in seen_folders:
        missed = len(unreadable)
        files = list(_walked(name, seen_folders, unreadable))
        if not files and len(unreadable) == missed:
            raise PublishError(f"{name}: the folder holds no file")
        yield from files


def _walked(folder: str, seen_folders: set[str], unreadable: list[tuple[str, str]]) -> Iterator[str]:
    """The regular files below `folder` in the order of their names, each real folder entered once."""
    real = os.path.realpath(folder)
    if real in seen_folders:
        return
    seen_folders.add(real)
    try:
        with os.scandir(folder) as scan:
            entries = sorted(scan, key=lambda entry: entry.name)
    except OSError as error:
        unreadable.append((folder, error.strerror or str(error)))
        return
    for entry in entries:
        name = str(Path(folder, entry.name)) if folder == os.curdir else os.path.join(folder, entry.name)  # noqa: PTH118
        if entry.is_dir():
            yield from _walked(name, seen_folders, unreadable)
        elif entry.is_file():
            yield name
        elif entry.is_symlink() and not Path(name).exists():
            unreadable.append((name, "a symbolic link to nothing"))


def label_of(file: str, label_from: LabelFrom) -> str | None:
    """The label of a file."""
    # Not resolved: a folder of symbolic links has the label that its own name gives.
    return Path(file).absolute().parent.name or None if label_from is LabelFrom.PARENT else None
