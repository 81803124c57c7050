"""Finding the files to publish: files, folders and patterns become a list of distinct regular files."""

import glob
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from producer.errors import PublishError
from producer.walk import walk


class LabelFrom(StrEnum):
    """The source of a file's label: the name of its parent folder, or none."""

    PARENT = "parent"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A regular file to publish: its name as the user gave it (below a folder: joined to the folder), and its label."""

    name: str
    label: str | None


@dataclass(frozen=True, slots=True)
class Sources:
    """The files to publish.

    Attributes:
        files: a list, or an iterator if the files are not known in advance.
        unreadable: (path, reason) of each folder that cannot be listed and each broken link below the given folders.
    """

    files: Iterable[SourceFile]
    unreadable: list[tuple[str, str]] = field(default_factory=list)

    @property
    def total(self) -> int | None:
        """The number of files, unreadable ones included; None if it is not known in advance."""
        return len(self.files) + len(self.unreadable) if isinstance(self.files, list) else None


def find_files(paths: Iterable[str | os.PathLike[str]], label_from: LabelFrom | str = LabelFrom.NONE) -> Sources:
    """Find every regular file that `paths` name, in the order given; within a folder or pattern sorted by name.

    Folders are walked recursively, hidden files included; symbolic links are followed and loops ended. A pattern
    (`*`, `?`, `[…]`, `**`) is expanded unless a file has exactly that name, and omits hidden files as a shell does. A
    file reached by several paths is listed once, under the first. Pipes, sockets and devices in a folder are ignored.

    Raises:
        PublishError: no path was given, one does not exist or is not a regular file, a folder contains no files, or a
            pattern matches nothing.
    """
    try:
        label_from = LabelFrom(label_from)
    except ValueError as error:
        raise PublishError(f"label_from: expected parent or none, got {label_from!r}") from error
    found: list[SourceFile] = []
    unreadable: list[tuple[str, str]] = []
    seen_files: set[str] = set()
    entered: set[str] = set()
    for path in paths:
        for name in _expanded(os.fspath(path)):
            for file in _files_of(name, entered, unreadable):
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


def _files_of(name: str, entered: set[str], unreadable: list[tuple[str, str]]) -> Iterator[str]:
    """The file `name` itself, or the files below the folder `name` in order of their names."""
    path = Path(name)
    if path.is_file():
        yield name
    elif not path.is_dir():
        what = "is not a regular file" if os.path.lexists(name) and path.exists() else "does not exist"
        raise PublishError(f"{name}: expected a file, a folder or a pattern, but it {what}")
    elif os.path.realpath(name) not in entered:
        prefix = f"{os.curdir}{os.sep}" if name == os.curdir else ""
        errors: list[tuple[str, str]] = []
        paths = walk(name, entered=entered, on_error=lambda path, why: errors.append((path.removeprefix(prefix), why)))
        files = [path.removeprefix(prefix) for path in paths]
        if not files and not errors:
            raise PublishError(f"{name}: the folder contains no files")
        unreadable += errors
        yield from files


def label_of(file: str, label_from: LabelFrom) -> str | None:
    """The label of a file, or None."""
    # Not resolved: a folder of symbolic links labels them by its own name.
    return Path(file).absolute().parent.name or None if label_from is LabelFrom.PARENT else None
