"""Files named in a list, one a row: a CSV with their labels, or lines of standard input.

A list may come from anybody. Its rows are bounded, and a name is never expanded: no patterns, no folders.
"""

import csv
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from producer.errors import PublishError
from producer.message import MAX_HEADER_CHARS
from producer.sources import LabelFrom, SourceFile, Sources, label_of

if TYPE_CHECKING:
    from _csv import Reader as CsvReader

MAX_LINE_BYTES = 16 * 1024  # four times the longest path of Linux
MAX_ROWS = 1_000_000
PATH, LABEL = "path", "label"


def read_csv(path: Path, max_rows: int = MAX_ROWS) -> Sources:
    """The files that a CSV names in its column `path`, with the labels of its column `label`.

    The header is required, the order of the columns and further ones are free; an empty label is none. A relative path
    begins at the folder of the CSV. Whether the files are there shows when they are sent.

    Raises:
        PublishError: the CSV cannot be read, or a line of it is too long, not UTF-8 or has no path; it is named.
    """
    try:
        with path.open("rb") as file:
            return Sources(list(_rows(path, csv.reader(_lines(path, file), strict=True), max_rows)))
    except OSError as error:
        raise PublishError(f"{path}: cannot be read: {error.strerror}") from error


def _rows(path: Path, reader: "CsvReader", max_rows: int) -> Iterator[SourceFile]:
    place: dict[str, int] | None = None
    found = 0
    try:
        for cells in reader:
            if place is None:
                place = _columns(path, cells)
            elif cells:
                found += 1
                if found > max_rows:
                    raise PublishError(f"{path}, line {reader.line_num}: more than {max_rows:,} rows; split the file")
                yield _row(f"{path}, line {reader.line_num}", path.parent, cells, place)
    except csv.Error as error:
        raise PublishError(f"{path}, line {reader.line_num}: no CSV: {error}") from error
    if not found:
        raise PublishError(f"{path}: expected a header and at least one row, path,label; got none")


def _columns(path: Path, header: list[str]) -> dict[str, int]:
    names = [name.strip().lower() for name in header]
    if PATH not in names or LABEL not in names:
        got = ",".join(header)[:100]
        raise PublishError(f"{path}, line 1: expected a header with the columns path and label, got {got!r}")
    return {name: names.index(name) for name in (PATH, LABEL)}


def _row(where: str, folder: Path, cells: list[str], place: dict[str, int]) -> SourceFile:
    if len(cells) <= max(place.values()):
        raise PublishError(f"{where}: expected a path and a label, got {','.join(cells)[:100]!r}")
    name, label = cells[place[PATH]].strip(), cells[place[LABEL]].strip()
    if not name or "\0" in name:
        raise PublishError(f"{where}: expected a path, got {name[:100]!r}")
    if len(label) > MAX_HEADER_CHARS:
        raise PublishError(f"{where}: the label has {len(label):,} characters, at most {MAX_HEADER_CHARS:,} are taken")
    return SourceFile(os.path.join(folder, name), label or None)  # noqa: PTH118  Path would normalise the name


def _lines(path: Path, file: BinaryIO) -> Iterator[str]:
    """The lines of a CSV; the csv module itself would read one of any length."""
    for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), start=1):
        if len(line) > MAX_LINE_BYTES:
            raise PublishError(f"{path}, line {number}: longer than {MAX_LINE_BYTES:,} bytes; expected path,label")
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise PublishError(f"{path}, line {number}: not UTF-8; save the file as CSV UTF-8") from error


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
