"""Files named in a list, one a row: a CSV with their labels, or lines of standard input.

A list may come from anybody. Its rows are bounded, and a name is never expanded: no patterns, no folders.
"""

import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath
from typing import BinaryIO

from producer.errors import PublishError
from producer.labelled_csv import MAX_ROWS, SHOWN, read_rows
from producer.message import MAX_HEADER_CHARS
from producer.sources import LabelFrom, SourceFile, Sources, label_of

MAX_LINE_BYTES = 16 * 1024  # four times the longest path of Linux
DIFFERENT = "rows of the CSV give it different labels"


def read_csv(path: Path, max_rows: int = MAX_ROWS) -> Sources:
    """The files that a CSV names, with their labels, as `producer.labelled_csv` reads them; an empty label is none.

    A relative path begins at the folder of the CSV, and so do the last parts of an absolute one that is not here, such
    as `C:\\photos\\cats\\a.jpg`. A file that is given twice is sent once; one with different labels is left out.
    Whether the files are there shows when they are sent.

    Raises:
        PublishError: the CSV cannot be read, or a line of it is too long or has no path; it is named.
    """
    labels: dict[str, str | None] = {}
    different: set[str] = set()
    _, rows = read_rows(path, max_rows=max_rows)
    for row in rows:
        where = f"{path}, line {row.line}"
        if not row.name or "\0" in row.name:
            raise PublishError(f"{where}: expected a path, got {row.name[:SHOWN]!r}")
        if row.label and len(row.label) > MAX_HEADER_CHARS:
            count = f"{len(row.label):,} characters, at most {MAX_HEADER_CHARS:,} are taken"
            raise PublishError(f"{where}: the label has {count}")
        file = _located(str(path.parent), row.name)
        if labels.setdefault(file, row.label) != row.label:
            different.add(file)
    if not labels:
        raise PublishError(f"{path}: expected a header and at least one row, path,label; got none")
    files = [SourceFile(file, label) for file, label in labels.items() if file not in different]
    return Sources(files, [(file, DIFFERENT) for file in sorted(different)])


def _located(folder: str, name: str) -> str:
    """The file that a row means: under its very name, another system's way to write it, or below the CSV's folder."""
    for written in (name, name.replace("\\", "/")):
        for form in (written, unicodedata.normalize("NFC", written), unicodedata.normalize("NFD", written)):
            if os.path.lexists(found := os.path.join(folder, form)):  # noqa: PTH118  Path would normalise the name
                return found
    elsewhere = PureWindowsPath(name)  # takes both kinds of slashes
    if elsewhere.anchor:
        parts = elsewhere.parts[1:]
        for start in range(len(parts)):
            below = os.path.join(folder, *parts[start:])  # noqa: PTH118
            if ".." not in parts[start:] and os.path.lexists(below):
                return below
    return os.path.join(folder, name)  # noqa: PTH118


def read_lines(stream: BinaryIO, label_from: LabelFrom = LabelFrom.NONE) -> Sources:
    """The files that the lines of a stream name, each taken when it comes: a pipe may go on for ever.

    Names are taken as they are, spaces included; empty lines are passed over.

    Raises:
        PublishError: while the files are taken, at a line that is no path.
    """

    def files() -> Iterator[SourceFile]:
        for number, line in enumerate(iter(lambda: stream.readline(MAX_LINE_BYTES + 1), b""), start=1):
            if len(line) > MAX_LINE_BYTES:
                raise PublishError(f"standard input, line {number}: longer than {MAX_LINE_BYTES:,} bytes, no path")
            if name := os.fsdecode(line.rstrip(b"\r\n")):
                yield SourceFile(name, label_of(name, label_from))

    return Sources(files())
