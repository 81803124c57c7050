"""Named arrays as `.npz` bytes, and the checks they pass before anything computes with them."""

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

ZIP_MAGIC = (b"PK\x03\x04", b"PK\x05\x06")  # with members, and without
MAX_ARRAY_BYTES = 2 * 1024**3

# What NumPy and zipfile raise for a file that is damaged, or made to do harm.
_UNREADABLE = (
    ValueError,
    OSError,
    EOFError,
    LookupError,
    ArithmeticError,
    RuntimeError,
    MemoryError,  # a header may promise an array that no machine can hold
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    tokenize.TokenError,
)


def multiply_rows(rows: NDArray[Number], matrix: NDArray[Number]) -> NDArray[Number]:
    """`rows @ matrix`, (N, D) by (D, K), each row by itself: its result does not depend on the rows beside it.

    BLAS chooses its kernels, and with them the order of additions, by the number of rows. An image then has other last
    digits in a micro-batch of 3 than in one of 300.
    """
    product: NDArray[Number] = np.matmul(rows[:, np.newaxis, :], matrix)[:, 0]
    return product


def write_npz(arrays: Arrays) -> bytes:
    """`arrays` as the bytes of an uncompressed `.npz`."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def read_npz(data: bytes, name: str) -> Arrays:
    """The arrays of an `.npz`, never unpickling anything; `name` is the file's, for errors.

    Raises:
        ModelError: not an npz, an array of objects, or more than `MAX_ARRAY_BYTES` when unpacked.
    """
    try:
        arrays = _unpacked(data, name)
    except ModelError:
        raise
    except _UNREADABLE as error:
        raise ModelError(f"{name} is not a readable npz without pickles: {error}") from error
    for key, array in arrays.items():
        if not isinstance(array, np.ndarray):  # NumPy gives a member that is no array as its bytes
            raise ModelError(f"{name} is not a readable npz without pickles: {key!r} is no array")
    return arrays


def _unpacked(data: bytes, name: str) -> Arrays:
    if not data.startswith(ZIP_MAGIC):  # a zip may have anything in front, such as an array on its own
        raise ModelError(f"{name} is not a readable npz without pickles: it is not a zip file from its first byte on")
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
    if unpacked > MAX_ARRAY_BYTES:
        raise ModelError(f"{name} unpacks to {unpacked:,} bytes, more than the {MAX_ARRAY_BYTES:,} allowed")
    with np.load(io.BytesIO(data), allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def checked_array(arrays: Arrays, name: str, shape: tuple[int | None, ...], dtype: type[Number]) -> NDArray[Number]:
    """The array `name`, of this shape (`None` for any length) and type, all finite.

    Raises:
        ModelError: it is missing, or of another shape or type, or holds NaN or infinite values.
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
        raise ModelError(f"array {name!r} holds NaN or infinite values")
    return array
