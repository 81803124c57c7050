"""CSV files of labels, which come from people: any usual delimiter, odd column names, and cells that mean nothing."""

import csv
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from streaming.errors import ServiceError

DELIMITERS = ",;\t|"
MAX_ROWS = 10_000_000
MAX_HEADER_CHARS = 100_000
MAX_LABEL_CHARS = 200
CONTROL_CHARACTER = re.compile(r"[\x00-\x1f\x7f-\x9f]")
# What pandas' read_csv takes for a missing value (its default `na_values`).
NUMBERS = {"NaN", "nan", "-NaN", "-nan", "1.#IND", "-1.#IND", "1.#QNAN", "-1.#QNAN"}
NOT_A_LABEL = frozenset({"", "#N/A", "#N/A N/A", "#NA", "<NA>", "N/A", "n/a", "NA", "NULL", "null", "None", *NUMBERS})

EMPTY = "the label is empty or stands for a missing value"
TOO_LONG = f"the label is longer than {MAX_LABEL_CHARS} characters"
NO_KEY = "the row names no image"
CONTROL = "the row has control characters"
CONFLICT = "rows give one image different labels"


@dataclass(frozen=True)
class LabelRows:
    """The usable rows of a CSV.

    Attributes:
        key: the column that names the images.
        labels: image → label.
        dropped: reason → rows that were not used.
        examples: reason → what one of them names.
    """

    key: str
    labels: dict[str, str]
    dropped: dict[str, int]
    examples: dict[str, str]


def read_labels(path: Path, keys: Sequence[str], max_rows: int = MAX_ROWS) -> LabelRows:
    """Read a CSV with the column `label` and one of the columns `keys`, the first of them that is there.

    Names and labels are stripped and in Unicode's composed form (NFC), paths have forward slashes. An image that is
    given twice counts once; one with different labels has none.

    Raises:
        ServiceError: the file is not there, not UTF-8, no CSV with these columns, or has too many rows.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            key, rows = _rows(path, file, keys)
            return _collect(path, key, rows, max_rows)
    except UnicodeDecodeError as error:
        raise ServiceError(f"{path} is not UTF-8 at byte {error.start:,}; save it as CSV UTF-8") from error
    except csv.Error as error:
        raise ServiceError(f"{path} is not a CSV: {error}") from error
    except OSError as error:
        raise ServiceError(f"{path} cannot be read: {error.strerror}") from error


def _collect(path: Path, key: str, rows: Iterator[tuple[str, str]], max_rows: int) -> LabelRows:
    labels: dict[str, str] = {}
    conflicting: dict[str, int] = {}  # image → rows
    dropped: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for number, (name, label) in enumerate(rows, 1):
        if number > max_rows:
            raise ServiceError(f"{path} has more than {max_rows:,} rows; split it")
        if reason := _unusable(name, label):
            dropped[reason] += 1
            examples.setdefault(reason, f"row {number}" if reason in (NO_KEY, CONTROL) else name[:MAX_LABEL_CHARS])
        elif name in conflicting:
            conflicting[name] += 1
        elif labels.setdefault(name, label) != label:
            conflicting[name] = 2
    for name in conflicting:
        del labels[name]
    if conflicting:
        dropped[CONFLICT] = sum(conflicting.values())
        examples[CONFLICT] = next(iter(conflicting))
    return LabelRows(key, labels, dict(dropped), examples)


def usable(label: str | None) -> bool:
    """Whether a label says something."""
    return label is not None and label.strip() not in NOT_A_LABEL and len(label) <= MAX_LABEL_CHARS


def composed(text: str) -> str:
    """The text in Unicode's composed form: é is one character, whichever system the name was written on."""
    return unicodedata.normalize("NFC", text)


def _rows(path: Path, file: TextIO, keys: Sequence[str]) -> tuple[str, Iterator[tuple[str, str]]]:
    """The key column's name, and (image, label) of every row that is not blank."""
    start = file.read(MAX_HEADER_CHARS)
    file.seek(0)
    # The delimiter is the one under which the header names the columns.
    for delimiter in DELIMITERS:
        names = next(csv.reader(start.splitlines(), delimiter=delimiter), [])
        columns = [name.strip().lower() for name in names]
        key = next((name for name in keys if name in columns), None)
        if "label" in columns and key is not None:
            reader = csv.reader(file, delimiter=delimiter)
            next(reader)
            return key, _cells(reader, columns.index(key), columns.index("label"))
    line = start.splitlines()[0] if start.strip() else ""
    raise ServiceError(
        f"{path}: expected a header with the columns label and one of {', '.join(keys)}, got {line[:100]!r}"
    )


def _cells(reader: Iterator[list[str]], key: int, label: int) -> Iterator[tuple[str, str]]:
    for row in reader:
        if row:
            name, value = (row[at].strip() if at < len(row) else "" for at in (key, label))
            yield composed(name.replace("\\", "/").removeprefix("./")), composed(value)


def _unusable(name: str, label: str) -> str | None:
    if not name:
        return NO_KEY
    if len(label) > MAX_LABEL_CHARS:
        return TOO_LONG
    if CONTROL_CHARACTER.search(name) or CONTROL_CHARACTER.search(label):
        return CONTROL
    return None if usable(label) else EMPTY
