"""CSV files of images and their labels, as spreadsheets and scripts write them.

The encoding is told by the first bytes (UTF-8, with and without BOM, UTF-16, UTF-32), the delimiter, quotes and escapes
by DuckDB's sniffer, and a column by any of its usual names. Every cell is text: `NA`, `None` and `007` are labels. A
file may come from anybody: its lines, cells and rows are bounded.
"""

import codecs
import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, BinaryIO

from producer.class_names import class_name
from producer.errors import PublishError

MAX_LINE_CHARS = 16 * 1024  # four times the longest path of Linux
MAX_ROWS = 1_000_000
SAMPLE_CHARS = 256 * 1024
DELIMITERS = ",;\t|"
SHOWN = 100

PATH_COLUMNS = (
    "path",
    "file",
    "filename",
    "file_name",
    "filepath",
    "file_path",
    "image",
    "image_path",
    "source",
    "name",
    "id",
)
LABEL_COLUMNS = ("label", "class", "class_name", "category", "target")
# The longer mark first: UTF-32's begins as UTF-16's does.
MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


@dataclass(frozen=True, slots=True)
class Row:
    """A row: its line in the file, what it names as it stands there, and the label in its common form, if any."""

    line: int
    name: str
    label: str | None


def read_rows(path: Path, keys: Sequence[str] = PATH_COLUMNS, max_rows: int = MAX_ROWS) -> tuple[str, Iterator[Row]]:
    """The column that names the images, and the rows of a CSV that are not blank, one by one.

    Args:
        keys: names of that column; the first of them that the header has is taken.

    Raises:
        PublishError: the CSV cannot be read or has no such header; while the rows are taken: one is not sound, or there
            are too many. The line is named.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise PublishError(f"{path}: cannot be read: {error.strerror}") from error
    rows = _rows(path, file, keys, max_rows)
    return str(next(rows)), (row for row in rows if isinstance(row, Row))


def _rows(path: Path, file: BinaryIO, keys: Sequence[str], max_rows: int) -> Iterator[str | Row]:
    reader: Any = None
    try:
        with file:
            encoding = _encoding(file.read(4))
            file.seek(0)
            text = io.TextIOWrapper(file, encoding, newline="")
            sample = text.read(SAMPLE_CHARS)
            text.seek(0)
            dialect, key, label = _dialect(path, sample, keys)
            reader = csv.reader(_lines(path, text), strict=True, **dialect)
            header = next((cells for cells in reader if _has_columns(cells, keys)), [key, label])
            places = [_columns(header).index(name) for name in (key, label)]
            yield key
            for number, cells in enumerate(filter(any, reader), start=1):
                if number > max_rows:
                    raise PublishError(f"{path}, line {reader.line_num}: more than {max_rows:,} rows; split the file")
                name, value = (cells[at].strip() if at < len(cells) else "" for at in places)
                yield Row(reader.line_num, name, class_name(value))
    except csv.Error as error:
        raise PublishError(f"{path}, line {reader.line_num}: no CSV: {error}") from error
    except UnicodeError as error:
        line = 1 + (reader.line_num if reader is not None else 0)
        raise PublishError(f"{path}, line {line} or later: not UTF-8; save the file as CSV UTF-8") from error
    except OSError as error:
        raise PublishError(f"{path}: cannot be read: {error.strerror}") from error


def _encoding(start: bytes) -> str:
    marked = next((encoding for mark, encoding in MARKS.items() if start.startswith(mark)), None)
    if marked is None and start[1::2] == b"\0\0":  # Latin letters in UTF-16, without its mark
        return "utf-16-le"
    return marked or ("utf-16-be" if start[::2] == b"\0\0" else "utf-8")


def _dialect(path: Path, sample: str, keys: Sequence[str]) -> tuple[dict[str, Any], str, str]:
    """How the cells are told apart, and the columns of names and labels: the sniffer's word, else the header's."""
    lines = [line for line in sample.splitlines()[:20] if line.strip() and not line.lower().startswith("sep=")]
    for dialect in (_sniffed(sample), *({"delimiter": delimiter} for delimiter in DELIMITERS)):
        header = next(csv.reader(lines[:1], **dialect), []) if dialect else []
        if _has_columns(header, keys):
            names = _columns(header)
            label = next(name for name in LABEL_COLUMNS if name in names)
            return dialect, next(name for name in keys if name in names and name != label), label
    if not lines:
        raise PublishError(f"{path}: expected a header and at least one row, {keys[0]},label; got none")
    raise PublishError(
        f"{path}, line 1: expected a header with the columns label and one of {', '.join(keys)}, "
        f"got {lines[0][:SHOWN]!r}"
    )


def _sniffed(sample: str) -> dict[str, Any]:
    """What DuckDB's sniffer finds, as arguments of `csv.reader`; empty where it finds nothing."""
    import duckdb

    whole = sample if len(sample) < SAMPLE_CHARS else sample[: sample.rfind("\n") + 1]
    if whole.lower().startswith("sep="):  # what Excel wants to be told, and nobody else
        whole = whole[whole.find("\n") + 1 :]
    with NamedTemporaryFile(suffix=".csv") as file, duckdb.connect() as connection:
        file.write(whole.encode("utf-8", "replace"))
        file.flush()
        try:
            found = connection.execute(
                "SELECT Delimiter, Quote, Escape FROM sniff_csv(?, all_varchar=true, header=true, null_padding=true, "
                "ignore_errors=true)",
                [file.name],
            ).fetchone()
        except duckdb.Error:
            return {}
    if found is None or found[0] not in DELIMITERS:
        return {}
    quote, escape = (None if mark == "(empty)" else mark for mark in found[1:])
    return {"delimiter": found[0], "quotechar": quote or '"'} | ({"escapechar": "\\"} if escape == "\\" else {})


def _columns(header: Sequence[str]) -> list[str]:
    return [name.strip().lower().replace(" ", "_") for name in header]


def _has_columns(header: Sequence[str], keys: Sequence[str]) -> bool:
    names = set(_columns(header))
    return bool(names & set(LABEL_COLUMNS)) and any(name in names for name in keys)


def _lines(path: Path, text: io.TextIOWrapper) -> Iterator[str]:
    """The lines, each bounded: the csv module itself would read one of any length. Null characters end no string."""
    for number, line in enumerate(iter(lambda: text.readline(MAX_LINE_CHARS + 1), ""), start=1):
        if len(line) > MAX_LINE_CHARS:
            raise PublishError(f"{path}, line {number}: longer than {MAX_LINE_CHARS:,} characters; expected path,label")
        yield line
