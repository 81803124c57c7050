"""Bloom filters of the images that a model was fitted on.

A filter has no false negatives; a false positive (1 in 1,000 at capacity) merely excludes an image from evaluation. It
takes 14.4 bits per image: 1.8 MB for a million images.

Sources: Bloom 1970, "Space/time trade-offs in hash coding with allowable errors"; Kirsch and Mitzenmacher 2006, "Less
hashing, same performance", for deriving all positions from two hashes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from models.arrays import Arrays
from models.errors import ModelError
from models.xxhash64 import xxhash64

FALSE_POSITIVES = 1e-3  # rate at capacity
BITS_PER_IMAGE = -math.log(FALSE_POSITIVES) / math.log(2) ** 2
POSITIONS = round(BITS_PER_IMAGE * math.log(2))
MAX_BYTES = 256 * 1024**2  # 149 million images
CHUNK_IMAGES = 65_536  # whose positions are in memory at a time


@dataclass(frozen=True)
class BloomFilter:
    """An approximate set of byte strings without false negatives.

    Attributes:
        bits: (n_bytes,) uint8, modified by `add` and `merge`.
        salt: seed of the hashes, so that two filters have different false positives.
    """

    bits: NDArray[np.uint8]
    salt: int

    @classmethod
    def empty(cls, capacity: int, salt: int) -> Self:
        """Create an empty filter for up to `capacity` strings; raises ModelError if it would exceed `MAX_BYTES`."""
        size = max(1, math.ceil(capacity * BITS_PER_IMAGE / 8))
        if size > MAX_BYTES:
            raise ModelError(f"a filter of {capacity:,} images needs {size:,} bytes, the limit is {MAX_BYTES:,}")
        return cls(np.zeros(size, np.uint8), salt)

    def add(self, values: Sequence[bytes]) -> None:
        """Add strings to the set."""
        for start in range(0, len(values), CHUNK_IMAGES):
            positions = self._positions(values[start : start + CHUNK_IMAGES]).reshape(-1)
            np.bitwise_or.at(self.bits, positions >> np.uint64(3), _masks(positions))

    def merge(self, other: "BloomFilter") -> None:
        """Add all strings of a filter of the same size and salt."""
        if other.salt != self.salt or len(other.bits) != len(self.bits):
            raise ModelError("only filters of the same size and salt can be merged")
        np.bitwise_or(self.bits, other.bits, out=self.bits)

    def contains(self, values: Sequence[bytes]) -> NDArray[np.bool_]:
        """Whether each of N strings is probably in the set, (N,) bool; False is certain."""
        found = np.empty(len(values), bool)
        for start in range(0, len(values), CHUNK_IMAGES):
            positions = self._positions(values[start : start + CHUNK_IMAGES])
            stored = self.bits[positions >> np.uint64(3)] & _masks(positions)
            found[start : start + CHUNK_IMAGES] = (stored != 0).all(axis=1)
        return found

    def _positions(self, values: Sequence[bytes]) -> NDArray[np.uint64]:
        """(N, POSITIONS) bit positions."""
        first, step = (xxhash64(values, self.salt ^ side) for side in (0, 1))
        with np.errstate(over="ignore"):
            places = first[:, None] + step[:, None] * np.arange(POSITIONS, dtype=np.uint64)
        return np.asarray(places % np.uint64(8 * len(self.bits)), np.uint64)


@dataclass(frozen=True)
class FittedOn:
    """The images that a model was fitted on.

    Attributes:
        images: those of its projection and classifier, and of its backbone if that was trained for this version.
        backbone: those of its backbone, if that is from another version; else None.
    """

    images: BloomFilter
    backbone: BloomFilter | None = None

    def contains(self, values: Sequence[bytes]) -> NDArray[np.bool_]:
        """Whether the model was probably fitted on each of N images, by id in UTF-8, (N,) bool; False is certain."""
        found = self.images.contains(values)
        return found if self.backbone is None else found | self.backbone.contains(values)

    def to_arrays(self) -> Arrays:
        """Named arrays for `from_arrays`."""
        filters = {"images": self.images} | ({} if self.backbone is None else {"backbone": self.backbone})
        bits: Arrays = {name: one.bits for name, one in filters.items()}
        return bits | {f"{name}_salt": np.array([one.salt], np.uint64) for name, one in filters.items()}

    @classmethod
    def from_arrays(cls, arrays: Arrays) -> Self:
        """Restore it from the arrays of `to_arrays`.

        Raises:
            ModelError: an array is missing, too large, or of another shape or type.
        """
        return cls(_read(arrays, "images"), _read(arrays, "backbone") if "backbone" in arrays else None)


def _read(arrays: Arrays, name: str) -> BloomFilter:
    for key, dtype, most in ((name, np.uint8, MAX_BYTES), (f"{name}_salt", np.uint64, 1)):
        if key not in arrays:
            raise ModelError(f"array {key!r} is missing")
        array = arrays[key]
        if array.dtype != dtype or array.ndim != 1 or not 1 <= len(array) <= most:
            want = f"1 to {most:,} numbers of type {np.dtype(dtype)}"
            raise ModelError(f"array {key!r} should be {want}, got {array.dtype} of shape {array.shape}")
    return BloomFilter(arrays[name], int(arrays[f"{name}_salt"][0]))


def _masks(positions: NDArray[np.uint64]) -> NDArray[np.uint8]:
    return np.left_shift(np.uint8(1), (positions & np.uint64(7)).astype(np.uint8))
