"""Which images a model was fitted on, as a Bloom filter: small, and it never forgets one.

A filter answers "possibly" or "certainly not". An image that it names wrongly (1 in 1,000 at its capacity) is only left
out of the images that the model is judged by. It takes 14.4 bits an image: 1.8 MB for a million of them.

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

FALSE_POSITIVES = 1e-3  # of images that a model was not fitted on, where the filter is filled to its capacity
BITS_PER_IMAGE = -math.log(FALSE_POSITIVES) / math.log(2) ** 2
POSITIONS = round(BITS_PER_IMAGE * math.log(2))
MAX_BYTES = 256 * 1024**2  # 149 million images
AT_ONCE = 65_536  # images whose positions are held in memory


@dataclass(frozen=True)
class BloomFilter:
    """A set of byte strings that is asked what it certainly does not hold.

    Attributes:
        bits: (n_bytes,) uint8, changed by `add` and `merge`.
        salt: seeds the hashes, so that two filters are not wrong about the same strings.
    """

    bits: NDArray[np.uint8]
    salt: int

    @classmethod
    def empty(cls, capacity: int, salt: int) -> Self:
        """An empty filter for up to `capacity` strings.

        Raises:
            ModelError: it would be larger than `MAX_BYTES`.
        """
        size = max(1, math.ceil(capacity * BITS_PER_IMAGE / 8))
        if size > MAX_BYTES:
            raise ModelError(f"a filter of {capacity:,} images takes {size:,} bytes, at most {MAX_BYTES:,} are allowed")
        return cls(np.zeros(size, np.uint8), salt)

    def add(self, values: Sequence[bytes]) -> None:
        """Put strings into the set."""
        for start in range(0, len(values), AT_ONCE):
            positions = self._positions(values[start : start + AT_ONCE]).reshape(-1)
            np.bitwise_or.at(self.bits, positions >> np.uint64(3), _masks(positions))

    def merge(self, other: "BloomFilter") -> None:
        """Put all that a filter of the same size and salt holds into the set."""
        if other.salt != self.salt or len(other.bits) != len(self.bits):
            raise ModelError("only filters of the same size and salt can be merged")
        np.bitwise_or(self.bits, other.bits, out=self.bits)

    def contains(self, values: Sequence[bytes]) -> NDArray[np.bool_]:
        """Whether each of N strings is possibly in the set, (N,) bool; False is certain."""
        found = np.empty(len(values), bool)
        for start in range(0, len(values), AT_ONCE):
            positions = self._positions(values[start : start + AT_ONCE])
            stored = self.bits[positions >> np.uint64(3)] & _masks(positions)
            found[start : start + AT_ONCE] = (stored != 0).all(axis=1)
        return found

    def _positions(self, values: Sequence[bytes]) -> NDArray[np.uint64]:
        """(N, POSITIONS) numbers of bits."""
        first, step = (xxhash64(values, self.salt ^ side) for side in (0, 1))
        with np.errstate(over="ignore"):
            places = first[:, None] + step[:, None] * np.arange(POSITIONS, dtype=np.uint64)
        return np.asarray(places % np.uint64(8 * len(self.bits)), np.uint64)


@dataclass(frozen=True)
class FittedOn:
    """What a model was fitted on.

    Attributes:
        images: what its projection and classifier were fitted on, and its backbone if it was trained for this version.
        backbone: what its backbone was trained on, where another version brought the backbone; else None.
    """

    images: BloomFilter
    backbone: BloomFilter | None = None

    def contains(self, values: Sequence[bytes]) -> NDArray[np.bool_]:
        """Whether the model was possibly fitted on each of N images, by their ids in UTF-8, (N,) bool."""
        found = self.images.contains(values)
        return found if self.backbone is None else found | self.backbone.contains(values)

    def to_arrays(self) -> Arrays:
        """As named arrays; `from_arrays` reads them back."""
        filters = {"images": self.images} | ({} if self.backbone is None else {"backbone": self.backbone})
        bits: Arrays = {name: one.bits for name, one in filters.items()}
        return bits | {f"{name}_salt": np.array([one.salt], np.uint64) for name, one in filters.items()}

    @classmethod
    def from_arrays(cls, arrays: Arrays) -> Self:
        """What `to_arrays` gave.

        Raises:
            ModelError: an array is missing, or of another shape or type, or too large.
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
