"""Manifests of files to publish, one per row: a CSV with labels, or the lines of standard input.

Manifests are untrusted: their rows are bounded, and names are never expanded as patterns or folders.
"""

import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath
from typing import BinaryIO

from producer.errors import PublishError
from producer.labelled_csv import MAX_ROWS, QUOTED_CHARS, read_rows
from producer.message import MAX_HEADER_CHARS
from producer.sources import LabelFrom, SourceFile, Sources, label_of

MAX_LINE_BYTES = 16 * 1024  # four times the longest path of Linux
CONFLICT = "rows of the CSV give it different labels"


def read_csv(path: Path, max_rows: int = MAX_ROWS) -> Sources:
    """Read the files that a CSV names, with their labels; an empty label is None.

    Relative paths are resolved against the folder of the CSV, and so are the last parts of absolute paths that do not
    exist here, such as `C:\\photos\\cats\\a.jpg`. A file listed twice is sent once; one with conflicting labels is
    skipped. The files are not opened here: a missing one is reported when it is sent.

    Raises:
        PublishError: the CSV cannot be read, or a line is too long or has no path; the message names the line.
    """
    labels: dict[str, str | None] = {}
    conflicting: set[str] = set()
    _, rows = read_rows(path, max_rows=max_rows)
    for row in rows:
        where = f"{path}, line {row.line}"
        if not row.name or "\0" in row.name:
            raise PublishError(f"{where}: expected a path, got {row.name[:QUOTED_CHARS]!r}")
        if row.label and len(row.label) > MAX_HEADER_CHARS:
            raise PublishError(
                f"{where}: the label has {len(row.label):,} characters, the limit is {MAX_HEADER_CHARS:,}"
            )
        file = _located(str(path.parent), row.name)
        if labels.setdefault(file, row.label) != row.label:
            conflicting.add(file)
    if not labels:
        raise PublishError(f"{path}: expected a header path,label and at least one row, got only the header")
    files = [SourceFile(file, label) for file, label in labels.items() if file not in conflicting]
    return Sources(files, [(file, CONFLICT) for file in sorted(conflicting)])


def _located(folder: str, name: str) -> str:
    """Resolve a row's path: as written, as another system writes it, or by its last parts below the CSV's folder."""
    for written in (name, name.replace("\\", "/")):
        for form in (written, unicodedata.normalize("NFC", written), unicodedata.normalize("NFD", written)):
            if os.path.lexists(found := os.path.join(folder, form)):  # noqa: PTH118  Path would normalise the name
                return found
    elsewhere = PureWindowsPath(name)  # accepts both kinds of slashes
    if elsewhere.anchor:
        parts = elsewhere.parts[1:]
        for start in range(len(parts)):
            below = os.path.join(folder, *parts[start:])  # noqa: PTH118
            if ".." not in parts[start:] and os.path.lexists(below):
                return below
    return os.path.join(folder, name)  # noqa: PTH118


def read_lines(stream: BinaryIO, label_from: LabelFrom = LabelFrom.NONE) -> Sources:
    """Read the files that the lines of a stream name, lazily: a pipe may be endless.

    Names are taken literally, spaces included; empty lines are ignored.

    Raises:
        PublishError: during iteration, at a line that is too long for a path.
    """

    def files() -> Iterator[SourceFile]:
        for number, line in enumerate(iter(lambda: stream.readline(MAX_LINE_BYTES + 1), b""), start=1):
            if len(line) > MAX_LINE_BYTES:
                raise PublishError(
                    f"standard input, line {number}: longer than {MAX_LINE_BYTES:,} bytes; expected one path per line"
                )
            if name := os.fsdecode(line.rstrip(b"\r\n")):
                yield SourceFile(name, label_of(name, label_from))

    return Sources(files())
