"""Labels of images from a CSV, the one reader for training, corrections and metadata files."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from producer.class_names import CONTROL_CHARACTER, MAX_LABEL_CHARS, composed
from producer.errors import PublishError
from producer.labelled_csv import Row, read_rows
from streaming.errors import DataError

MAX_ROWS = 10_000_000
# Common spellings of a missing value. They are treated as class names, with a warning.
MISSING_VALUES = frozenset({"#N/A", "<NA>", "N/A", "n/a", "NA", "NULL", "null", "None", "NaN", "nan", "NaT"})

EMPTY = "the label is empty"
TOO_LONG = f"the label is longer than {MAX_LABEL_CHARS} characters"
NO_KEY = "the row does not name an image"
CONTROL = "the row contains control characters"
CONFLICT = "rows give one image different labels"


@dataclass(frozen=True)
class LabelRows:
    """The usable rows of a CSV.

    Attributes:
        key: the column that identifies the images.
        labels: image → label.
        dropped: reason → number of rows that were not used.
        examples: reason → the image of one of them.
    """

    key: str
    labels: dict[str, str]
    dropped: dict[str, int]
    examples: dict[str, str]


def read_labels(path: Path, keys: Sequence[str], max_rows: int = MAX_ROWS) -> LabelRows:
    """Read a CSV with a column of labels and a column that identifies the images.

        Names and labels are normalised to NFC, paths to forward slashes. An image that occurs with different labels has
        none.

    Args:
        keys: names of identifying columns, in order of preference.

    Raises:
        ServiceError: the file does not exist, lacks these columns, or has too many rows.
    """
    try:
        key, rows = read_rows(path, keys, max_rows)
        return collect(key, rows)
    except PublishError as error:
        raise DataError(str(error)) from error


def collect(key: str, rows: Iterable[Row]) -> LabelRows:
    """Collect the label of each image from rows."""
    labels: dict[str, str] = {}
    conflicting: dict[str, int] = {}  # image → rows
    dropped: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for row in rows:
        name, label = composed(row.name.replace("\\", "/").removeprefix("./")), row.label or ""
        if reason := _unusable(name, label):
            dropped[reason] += 1
            examples.setdefault(reason, f"line {row.line}" if reason in (NO_KEY, CONTROL) else name[:MAX_LABEL_CHARS])
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


def _unusable(name: str, label: str) -> str | None:
    if not name:
        return NO_KEY
    if len(label) > MAX_LABEL_CHARS:
        return TOO_LONG
    if CONTROL_CHARACTER.search(name) or CONTROL_CHARACTER.search(label):
        return CONTROL
    return None if label else EMPTY
