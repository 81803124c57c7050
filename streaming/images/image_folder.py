"""A folder of image files, and their labels: from the folders' names, from a pattern over the paths, or from a CSV."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from streaming.errors import ServiceError
from streaming.images.labels_csv import composed, read_labels
from streaming.images.patterns import extract_group

CSV_KEYS = ("path", "file", "filename", "name", "id", "image_id")

NO_FOLDER = "it lies in no class folder"
NO_MATCH = "its path does not match the label pattern"
NO_ROW = "the CSV has no usable row for it"
AMBIGUOUS = "the CSV's name for it fits other files, too: give paths"
NO_IMAGE = "a row of the CSV names an image that is not there"
NOT_UTF8 = "its name is not UTF-8"
UNREADABLE = "the folder cannot be read"


@dataclass(frozen=True)
class LabelledFile:
    """A file, the class it shows where that is known, and its size where it was looked up."""

    path: str
    label: str | None
    bytes: int = 0


@dataclass
class LeftOut:
    """What was left out: reason → how many, and one of them."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, why: str, what: str, n: int = 1) -> None:
        self.counts[why] += n
        self.examples.setdefault(why, what.encode("utf-8", "replace").decode())


@dataclass(frozen=True)
class _Found:
    """A file of the folder: where it is, and its path below the folder with forward slashes, in composed Unicode."""

    path: str
    below: PurePosixPath
    bytes: int


def read_folder(
    folder: Path, pattern: str | None, labels_csv: Path | None, keep_unlabelled: bool
) -> tuple[list[LabelledFile], LeftOut]:
    """Every file below `folder` in order of path, but for hidden ones, each with its label.

    Raises:
        ServiceError: there is no such folder or no file in it, or the pattern or CSV cannot be used.
    """
    if not folder.is_dir():
        raise ServiceError(
            f"{folder} is not a folder; expected one folder per class with images in it, or a Parquet or Delta table"
        )
    left_out = LeftOut()
    found = sorted(_walk(folder, left_out), key=lambda file: file.path)
    if not found:
        raise ServiceError(f"{folder} holds no images; expected one folder per class with images in it")
    if labels_csv is not None:
        labels, why = _by_csv(folder, found, labels_csv, left_out)
    elif pattern is not None:
        labels, why = _by_pattern(found, pattern), NO_MATCH
    else:
        labels, why = [file.below.parent.name or None for file in found], NO_FOLDER
    files: list[LabelledFile] = []
    for file, label in zip(found, labels, strict=True):
        if label is not None or keep_unlabelled:
            files.append(LabelledFile(file.path, label, file.bytes))
        else:
            left_out.add(why, str(file.below))
    return files, left_out


def _walk(folder: Path, left_out: LeftOut) -> Iterator[_Found]:
    def unreadable(error: OSError) -> None:
        left_out.add(UNREADABLE, str(error.filename))

    for directory, folders, names in os.walk(folder, onerror=unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(directory, name)
            if name.startswith(".") or not path.is_file():  # a pipe or a socket is no file
                continue
            try:
                below = composed(path.relative_to(folder).as_posix())
                below.encode()
                yield _Found(str(path), PurePosixPath(below), path.stat().st_size)
            except UnicodeEncodeError:
                left_out.add(NOT_UTF8, str(path))


def _by_pattern(found: Sequence[_Found], pattern: str) -> list[str | None]:
    """The group `label`, or the first group, of the pattern in each path; None where it does not match."""
    import pyarrow as pa

    paths = pa.array([str(file.below) for file in found], pa.string())
    labels: list[str | None] = extract_group(paths, pattern, "label").to_pylist()
    return labels


def _by_csv(folder: Path, found: Sequence[_Found], labels_csv: Path, left_out: LeftOut) -> tuple[list[str | None], str]:
    """Labels joined by path, by path below the folder, by file name, or by name without suffix, whichever is there.

    A name that several files have says nothing of any of them.
    """
    rows = read_labels(labels_csv, CSV_KEYS)
    for why, n in rows.dropped.items():
        left_out.add(why, rows.examples[why], n)
    names = Counter(file.below.name for file in found)
    stems = Counter(file.below.stem for file in found)
    labels: list[str | None] = []
    used: set[str] = set()
    for file in found:
        name, stem = file.below.name, file.below.stem
        paths = (composed(file.path), f"{folder.name}/{file.below}", str(file.below))
        key = next((one for one in (*paths, name, stem) if one in rows.labels), None)
        if key is not None:
            used.add(key)
        ambiguous = key is not None and key not in paths and (names[name] if key == name else stems[stem]) > 1
        if ambiguous:
            left_out.add(AMBIGUOUS, str(file.below))
        labels.append(None if key is None or ambiguous else rows.labels[key])
    unused = [key for key in rows.labels if key not in used]
    if unused:
        left_out.add(NO_IMAGE, unused[0], len(unused))
    return labels, NO_ROW
