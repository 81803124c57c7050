"""XXH64 of many byte strings at once with NumPy; equal to Spark SQL's `xxhash64`.

Source: the xxHash specification (github.com/Cyan4973/xxHash, doc/xxhash_spec.md). Not a cryptographic hash.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]

HASH_BITS = 53  # of the 64 used to hold out images: those that JSON numbers represent exactly
SPARK_SEED = 42  # of the first column that Spark SQL hashes; the hash of each column is the seed of the next
INT_MAX = 2**31

P1, P2, P3, P4, P5 = (
    np.uint64(prime)
    for prime in (0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5)
)


def xxhash64(values: Sequence[bytes], seed: int) -> Hashes:
    """XXH64 of each of N byte strings, (N,) uint64."""
    hashes = np.empty(len(values), np.uint64)
    lengths = np.fromiter(map(len, values), np.int64, len(values))
    for length in np.unique(lengths):
        at = np.flatnonzero(lengths == length)
        block = np.frombuffer(b"".join([values[i] for i in at.tolist()]), np.uint8).reshape(len(at), length)
        hashes[at] = _hash_rows(block, np.full(len(at), seed, np.uint64))
    return hashes


def spark_xxhash64(values: Sequence[bytes], number: int) -> Hashes:
    """Spark SQL's `xxhash64(value, number)` of a string column and an integer literal, (N,) uint64."""
    size = 4 if -INT_MAX <= number < INT_MAX else 8
    literal = np.frombuffer(number.to_bytes(size, "little", signed=True), np.uint8)
    rows = np.broadcast_to(literal, (len(values), size))
    return _hash_rows(np.ascontiguousarray(rows), xxhash64(values, SPARK_SEED))


def _hash_rows(block: NDArray[np.uint8], seed: Hashes) -> Hashes:
    """XXH64 of the rows of (N, L) bytes, each with its own seed."""
    length = block.shape[1]
    stripes = length // 32 * 32
    with np.errstate(over="ignore"):
        if stripes:
            lanes = [seed + P1 + P2, seed + P2, seed.copy(), seed - P1]
            for start in range(0, stripes, 8):
                lane = start // 8 % 4
                lanes[lane] = _round(lanes[lane], _words(block, start))
            mixed = sum((_rotated(one, by) for one, by in zip(lanes, (1, 7, 12, 18), strict=True)), np.uint64(0))
            for one in lanes:
                mixed = (mixed ^ _round(np.zeros_like(one), one)) * P1 + P4
        else:
            mixed = seed + P5
        mixed = mixed + np.uint64(length)
        for place in range(stripes, length - 7, 8):
            mixed = _rotated(mixed ^ _round(np.zeros_like(mixed), _words(block, place)), 27) * P1 + P4
        place = stripes + (length - stripes) // 8 * 8
        if length - place >= 4:  # noqa: PLR2004
            mixed = _rotated(mixed ^ (_words(block, place, "<u4") * P1), 23) * P2 + P3
            place += 4
        for at in range(place, length):
            mixed = _rotated(mixed ^ (block[:, at].astype(np.uint64) * P5), 11) * P1
        mixed = (mixed ^ (mixed >> np.uint64(33))) * P2
        mixed = (mixed ^ (mixed >> np.uint64(29))) * P3
        return np.asarray(mixed ^ (mixed >> np.uint64(32)), np.uint64)


def _words(block: NDArray[np.uint8], start: int, kind: str = "<u8") -> Hashes:
    size = np.dtype(kind).itemsize
    return np.ascontiguousarray(block[:, start : start + size]).view(kind)[:, 0].astype(np.uint64)


def _round(lane: Hashes, words: Hashes) -> Hashes:
    return np.asarray(_rotated(lane + words * P2, 31) * P1, np.uint64)


def _rotated(values: Hashes, by: int) -> Hashes:
    return np.asarray((values << np.uint64(by)) | (values >> np.uint64(64 - by)), np.uint64)
