"""Reading tensors from PyTorch files in the legacy format, without torch and without executing code.

The format (torch/serialization.py, `_legacy_load`): five pickles (a magic number, the protocol, information on the
writing machine, the state dict, the storage keys), then for each storage an 8-byte count and the raw elements. A tensor
is a view of a storage: offset, sizes and strides in elements, which need not be contiguous.

A pickle can call any function by name. Here only three names are allowed, all harmless: `OrderedDict`, the constructor
of a view, and storage types, which become strings.
"""

import collections
import hashlib
import pickle
from io import BytesIO
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.errors import ModelError

MAX_FILE_BYTES = 1 << 30
_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_COUNT_BYTES = 8
_MAX_DIMENSIONS = 8
_DTYPES = {
    "DoubleStorage": "<f8",
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "?",
}


class _Storage(NamedTuple):
    key: str
    dtype: str
    length: int


class _View(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _RestrictedUnpickler(pickle.Unpickler):
    """Builds views from a pickle that may refer only to tensors, their storages and ordered dictionaries."""

    def find_class(self, module: str, name: str, /) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self._rebuild_view
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        raise ModelError(f"it names {module}.{name}, which is neither a tensor nor its storage")

    def persistent_load(self, pid: Any, /) -> _Storage:
        match pid:
            case ("storage", str(dtype), str(key), str(), int(length), None) if dtype in _DTYPES.values():
                return _Storage(key, dtype, length)
        raise ModelError("a storage is described in an unknown way")

    @staticmethod
    def _rebuild_view(*arguments: Any) -> _View:
        match arguments:
            case (_Storage() as storage, int(offset), tuple(shape), tuple(strides), *_):
                return _View(storage, offset, shape, strides)
        raise ModelError("a tensor is described in an unknown way")


def read_tensors(path: Path, sha256: str | None = None) -> dict[str, NDArray[Any]]:
    """Read every tensor of the state dict in `path` as a contiguous array that owns its memory.

    Args:
        sha256: the expected hash in hex, checked before the file is parsed.

    Raises:
        ModelError: the file is missing, too large, malformed or not the expected one, or refers to anything but
            tensors.
    """
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise ModelError(f"{path} has {size} bytes, at most {MAX_FILE_BYTES} are read")
        data = path.read_bytes()
    except OSError as error:
        raise ModelError(f"cannot read the weights {path}: {error.strerror}") from error
    actual = hashlib.sha256(data).hexdigest()
    if sha256 is not None and actual != sha256:
        raise ModelError(f"{path} is damaged or not the expected file: SHA-256 {actual}, expected {sha256}")
    try:
        return _parse(data)
    except ModelError as error:
        raise ModelError(f"{path} is not a usable PyTorch weights file of the legacy format: {error}") from error
    except Exception as error:
        raise ModelError(f"{path} is not a PyTorch weights file of the legacy format ({error})") from error


def _parse(data: bytes) -> dict[str, NDArray[Any]]:
    stream = BytesIO(data)

    def next_pickle() -> Any:
        return _RestrictedUnpickler(stream).load()

    if next_pickle() != _MAGIC or next_pickle() != _PROTOCOL:
        raise ModelError("it does not start with the magic number and protocol 1001")
    machine = next_pickle()
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise ModelError("it was not written on a little-endian machine")
    views = next_pickle()
    if not isinstance(views, dict) or not all(isinstance(k, str) and isinstance(v, _View) for k, v in views.items()):
        raise ModelError("it holds something other than a dictionary of named tensors")
    storages = _read_storages(stream, next_pickle(), {v.storage.key: v.storage for v in views.values()})
    return {name: _materialise(name, view, storages[view.storage.key]) for name, view in views.items()}


def _read_storages(stream: BytesIO, keys: Any, declared: dict[str, _Storage]) -> dict[str, NDArray[Any]]:
    if not isinstance(keys, list) or len(keys) != len(declared) or set(keys) != set(declared):
        raise ModelError("its list of storages differs from what its tensors use")
    storages = {}
    for key in keys:
        dtype, length = np.dtype(declared[key].dtype), declared[key].length
        count = int.from_bytes(stream.read(_COUNT_BYTES), "little")
        if count != length:
            raise ModelError(f"storage {key} has {count} elements, its tensors say {length}")
        raw = stream.read(count * dtype.itemsize)
        if len(raw) != count * dtype.itemsize:
            raise ModelError(f"it ends within storage {key}")
        storages[key] = np.frombuffer(raw, dtype)
    return storages


def _materialise(name: str, view: _View, storage: NDArray[Any]) -> NDArray[Any]:
    """Copy a strided view out of its storage after checking its bounds."""
    _, offset, shape, strides = view
    numbers = (offset, *shape, *strides)
    if len(shape) != len(strides) or len(shape) > _MAX_DIMENSIONS:
        raise ModelError(f"tensor {name} has shape {shape} and strides {strides}")
    if not all(isinstance(number, int) and number >= 0 for number in numbers):
        raise ModelError(f"tensor {name} has an offset, size or stride that is not a count")
    empty = 0 in shape
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if np.dtype(view.storage.dtype) != storage.dtype or (not empty and last >= len(storage)):
        raise ModelError(f"tensor {name} reaches outside of its storage")
    if prod(shape) > len(storage):
        raise ModelError(f"tensor {name} has more elements than its storage")
    if empty:
        return np.empty(shape, storage.dtype)
    byte_strides = tuple(stride * storage.itemsize for stride in strides)
    strided = np.lib.stride_tricks.as_strided(storage[offset:], shape, byte_strides, writeable=False)
    return np.array(strided, order="C")
