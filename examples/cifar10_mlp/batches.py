"""Converting CIFAR-10, in its python or binary version, to a Parquet file and a folder of PNG images.

One batch of 10,000 images is in memory at a time. Values are unsigned bytes, so that the original's check for NaN is
not needed.
"""

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from examples.cifar10_mlp.unpickle import MAX_BYTES, Batch, read_batch, read_names
from streaming.errors import ServiceError

SIDE = 32
WIDTH = 3 * SIDE * SIDE
CLASSES = 10
ROWS_PER_GROUP = 1_000
SCHEMA = pa.schema(
    [
        pa.field("name", pa.string(), nullable=False),
        pa.field("label", pa.string(), nullable=False),
        pa.field("image", pa.binary(), nullable=False),  # PNG
    ]
)


@dataclass(frozen=True)
class Cifar10:
    """The files of the data set.

    Attributes:
        training, test: files of batches.
        names: the classes by index.
        binary: whether it is the binary version rather than the python version.
    """

    training: tuple[Path, ...]
    test: tuple[Path, ...]
    names: tuple[str, ...]
    binary: bool

    def read(self, file: Path) -> Batch:
        """Read a batch; raises ServiceError if the file is not in the expected format."""
        return read_binary(file) if self.binary else read_batch(file, WIDTH, CLASSES)

    def images(self, files: Iterable[Path]) -> Iterator[tuple[str, str, bytes]]:
        """(name, label, PNG) of every image of the files."""
        for file in files:
            batch = self.read(file)
            pixels = batch.data.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)
            for number, (image, label) in enumerate(zip(pixels, batch.labels, strict=True)):
                buffer = io.BytesIO()
                Image.fromarray(np.ascontiguousarray(image)).save(buffer, "PNG", compress_level=1)
                yield f"{file.stem}-{number:05d}.png", self.names[label], buffer.getvalue()


def open_cifar10(folder: Path) -> Cifar10:
    """Open the data set in a folder of the extracted archive.

    Raises:
        ServiceError: files are missing, or do not name ten classes.
    """
    binary = (folder / "test_batch.bin").is_file()
    suffix = ".bin" if binary else ""
    training = tuple(sorted(folder.glob(f"data_batch_[0-9]{suffix}")))
    test = folder / f"test_batch{suffix}"
    if not training or not test.is_file():
        raise ServiceError(
            f"{folder} does not contain CIFAR-10: expected data_batch_1 … data_batch_5 and test_batch, "
            "or the same with .bin (https://www.cs.toronto.edu/~kriz/cifar.html)"
        )
    names = _names_of_binary(folder / "batches.meta.txt") if binary else read_names(folder / "batches.meta")
    if len(set(names)) != CLASSES or not all(name.replace("_", "").isalnum() for name in names):
        raise ServiceError(f"{folder}: expected the names of {CLASSES} classes, of letters and digits, got {names}")
    return Cifar10(training, (test,), tuple(names), binary)


def read_binary(file: Path) -> Batch:
    """Read a batch of the binary version: per image one byte for the label and 3,072 for red, green and blue."""
    size = file.stat().st_size
    if size % (WIDTH + 1) or not 0 < size <= MAX_BYTES:
        raise ServiceError(f"{file} has {size:,} bytes, expected a multiple of {WIDTH + 1:,}, at most {MAX_BYTES:,}")
    rows = np.fromfile(file, np.uint8).reshape(-1, WIDTH + 1)
    if rows[:, 0].max() >= CLASSES:
        raise ServiceError(f"{file} has the label {rows[:, 0].max()}, expected 0 to {CLASSES - 1}")
    return Batch(rows[:, 1:], rows[:, 0].astype(np.int64), [])


def write_parquet(images: Iterable[tuple[str, str, bytes]], to: Path) -> int:
    """Write (name, label, PNG) as a Parquet file of `SCHEMA` in chunks; returns the number of rows."""
    written = 0
    rows: list[tuple[str, str, bytes]] = []
    with pq.ParquetWriter(to, SCHEMA) as parquet:

        def flush() -> None:
            names, labels, contents = zip(*rows, strict=True)
            parquet.write_batch(
                pa.RecordBatch.from_arrays([pa.array(names), pa.array(labels), pa.array(contents)], schema=SCHEMA)
            )
            rows.clear()

        for image in images:
            rows.append(image)
            written += 1
            if len(rows) == ROWS_PER_GROUP:
                flush()
        if rows:
            flush()
    return written


def _names_of_binary(file: Path) -> list[str]:
    if not file.is_file():
        raise ServiceError(f"{file} is missing: it names the classes")
    return file.read_text(encoding="utf-8", errors="replace")[:1_000].split()
