"""A worker's decoded images in an anonymous temporary file.

The file is in Spark's scratch directory: the operating system caches as much as fits, and a worker's own memory does
not grow with its images.
"""

from collections.abc import Iterator
from tempfile import TemporaryFile

import numpy as np
from numpy.typing import NDArray

from models.scorer import Images


class ImagesCache:
    """Images (N, H, W, 3) uint8 with class indices, appended once and then read in any order."""

    def __init__(self, size: tuple[int, int]) -> None:
        """Create an empty cache of images of `size` (height, width)."""
        self._shape = (*size, 3)
        # The file has no name, so nothing is left of it even after SIGKILL.
        self._file = TemporaryFile(prefix="imagestream-images-")  # noqa: SIM115
        self._labels: list[NDArray[np.int64]] = []
        self._ids: list[str] = []
        self._images: Images = np.empty((0, *self._shape), np.uint8)
        self.labels: NDArray[np.int64] = np.empty(0, np.int64)

    def __len__(self) -> int:
        return len(self._ids)

    def append(self, images: Images, labels: NDArray[np.int64], ids: list[str]) -> None:
        self._file.write(np.ascontiguousarray(images).tobytes())
        self._labels.append(labels)
        self._ids += ids

    def close(self) -> None:
        """Finish appending, so that images can be read."""
        self._file.flush()
        if self._ids:
            self._images = np.memmap(self._file, np.uint8, "r", shape=(len(self._ids), *self._shape))
            self.labels = np.concatenate(self._labels)

    def take(self, rows: NDArray[np.int64]) -> Images:
        """Return copies of the images at `rows`, in that order."""
        return np.asarray(self._images[rows])

    def ids(self, rows: NDArray[np.int64]) -> list[str]:
        return [self._ids[row] for row in rows]

    def batches(self, size: int) -> Iterator[NDArray[np.int64]]:
        """Yield all row indices in order, `size` at a time."""
        for start in range(0, len(self), size):
            yield np.arange(start, min(start + size, len(self)))
