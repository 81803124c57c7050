"""Reading and writing named arrays as `.npz` bytes, and validating them."""

import io
import lzma
import tokenize
import zipfile
import zlib
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from models.errors import ModelError

Features = NDArray[np.float32]
Arrays = dict[str, NDArray[Any]]
Number = TypeVar("Number", np.float32, np.float64)

ZIP_MAGIC = (b"PK\x03\x04", b"PK\x05\x06")  # with members, and empty
MAX_ARRAY_BYTES = 2 * 1024**3

# Raised by NumPy and zipfile for damaged or malicious files.
_UNREADABLE = (
    ValueError,
    OSError,
    EOFError,
    LookupError,
    ArithmeticError,
    RuntimeError,
    MemoryError,  # a header may claim any size
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    tokenize.TokenError,
)


def multiply_rows(rows: NDArray[Number], matrix: NDArray[Number]) -> NDArray[Number]:
    """`rows @ matrix`, (N, D) by (D, K) → (N, K), such that each row's result is independent of the other rows.

    BLAS chooses its kernels, and so the order of additions, by the number of rows: an image's features would differ in
    their last digits between a micro-batch of 3 and one of 300.
    """
    product: NDArray[Number] = np.matmul(rows[:, np.newaxis, :], matrix)[:, 0]
    return product


def write_npz(arrays: Arrays) -> bytes:
    """Serialise arrays as an uncompressed `.npz`."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def read_npz(data: bytes, name: str) -> Arrays:
    """Read the arrays of an `.npz` without unpickling anything; `name` is for errors.

    Raises:
        ModelError: not an npz, an array of objects, or more than `MAX_ARRAY_BYTES` when decompressed.
    """
    try:
        arrays = _unpacked(data, name)
    except ModelError:
        raise
    except _UNREADABLE as error:
        raise ModelError(f"{name} is not a readable npz without pickles: {error}") from error
    for key, array in arrays.items():
        if not isinstance(array, np.ndarray):  # NumPy returns a member that is not an array as bytes
            raise ModelError(f"{name} is not a readable npz without pickles: {key!r} is not an array")
    return arrays


def _unpacked(data: bytes, name: str) -> Arrays:
    if not data.startswith(ZIP_MAGIC):  # zipfile accepts leading bytes, which np.load would interpret
        raise ModelError(f"{name} is not a readable npz without pickles: it is not a zip file")
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
    if unpacked > MAX_ARRAY_BYTES:
        raise ModelError(f"{name} decompresses to {unpacked:,} bytes, the limit is {MAX_ARRAY_BYTES:,}")
    with np.load(io.BytesIO(data), allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def checked_array(arrays: Arrays, name: str, shape: tuple[int | None, ...], dtype: type[Number]) -> NDArray[Number]:
    """Return the array `name` after validating it; None in `shape` allows any length.

    Raises:
        ModelError: the array is missing, has another shape or type, or contains NaN or infinite values.
    """
    if name not in arrays:
        raise ModelError(f"array {name!r} is missing")
    array = arrays[name]
    same_shape = len(array.shape) == len(shape) and all(
        want in (None, got) for want, got in zip(shape, array.shape, strict=True)
    )
    if array.dtype != dtype or not same_shape:
        want = f"{np.dtype(dtype)} of shape {shape}"
        raise ModelError(f"array {name!r} should be {want}, got {array.dtype} of shape {array.shape}")
    if not np.isfinite(array).all():
        raise ModelError(f"array {name!r} contains NaN or infinite values")
    return array
