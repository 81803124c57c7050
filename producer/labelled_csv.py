"""Reading CSV files of images and labels, as spreadsheets and scripts write them.

The encoding is detected from the first bytes (UTF-8 with or without BOM, UTF-16, UTF-32), the delimiter, quotes and
escapes by DuckDB's sniffer, and columns by their usual names. Every cell is text: `NA`, `None` and `007` are labels.
Files are untrusted: their lines, cells and rows are bounded.
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

MAX_LINE_CHARS = 16 * 1024  # four times Linux's PATH_MAX
MAX_ROWS = 1_000_000
SAMPLE_CHARS = 256 * 1024
DELIMITERS = ",;\t|"
QUOTED_CHARS = 100  # of hostile text in a message

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
# Longest first: UTF-32's byte order mark begins with that of UTF-16.
BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


@dataclass(frozen=True, slots=True)
class Row:
    """A row: its line number, the image's name as written, and the normalised label, if any."""

    line: int
    name: str
    label: str | None


def read_rows(path: Path, keys: Sequence[str] = PATH_COLUMNS, max_rows: int = MAX_ROWS) -> tuple[str, Iterator[Row]]:
    """Read a CSV lazily: return the name of the column that names the images, and its rows without blank ones.

    Args:
        keys: accepted names of that column; the first one in the header is used.

    Raises:
        PublishError: the CSV cannot be read or lacks such a header; or, during iteration, a row is malformed or there
            are too many. The message names the line.
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
        raise PublishError(f"{path}, line {reader.line_num}: not valid CSV: {error}") from error
    except UnicodeError as error:
        line = 1 + (reader.line_num if reader is not None else 0)
        raise PublishError(f"{path}, line {line} or later: not UTF-8; save the file as CSV UTF-8") from error
    except OSError as error:
        raise PublishError(f"{path}: cannot be read: {error.strerror}") from error


def _encoding(start: bytes) -> str:
    marked = next((encoding for mark, encoding in BYTE_ORDER_MARKS.items() if start.startswith(mark)), None)
    if marked is None and start[1::2] == b"\0\0":  # ASCII in UTF-16 without a byte order mark
        return "utf-16-le"
    return marked or ("utf-16-be" if start[::2] == b"\0\0" else "utf-8")


def _dialect(path: Path, sample: str, keys: Sequence[str]) -> tuple[dict[str, Any], str, str]:
    """The arguments of `csv.reader` and the columns of names and labels, sniffed or else guessed from the header."""
    lines = [line for line in sample.splitlines()[:20] if line.strip() and not line.lower().startswith("sep=")]
    for dialect in (_sniffed(sample), *({"delimiter": delimiter} for delimiter in DELIMITERS)):
        header = next(csv.reader(lines[:1], **dialect), []) if dialect else []
        if _has_columns(header, keys):
            names = _columns(header)
            label = next(name for name in LABEL_COLUMNS if name in names)
            return dialect, next(name for name in keys if name in names and name != label), label
    if not lines:
        raise PublishError(f"{path}: expected a header {keys[0]},label and at least one row, got an empty file")
    raise PublishError(
        f"{path}, line 1: expected a header with the columns label and one of {', '.join(keys)}, "
        f"got {lines[0][:QUOTED_CHARS]!r}"
    )


def _sniffed(sample: str) -> dict[str, Any]:
    """The dialect that DuckDB's sniffer finds, as arguments of `csv.reader`; empty if it finds none."""
    import duckdb

    whole = sample if len(sample) < SAMPLE_CHARS else sample[: sample.rfind("\n") + 1]
    if whole.lower().startswith("sep="):  # Excel's own directive
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
    """The lines, each bounded, as the csv module reads one of any length. A null character does not end a string."""
    for number, line in enumerate(iter(lambda: text.readline(MAX_LINE_CHARS + 1), ""), start=1):
        if len(line) > MAX_LINE_CHARS:
            raise PublishError(f"{path}, line {number}: longer than {MAX_LINE_CHARS:,} characters; expected path,label")
        yield line
