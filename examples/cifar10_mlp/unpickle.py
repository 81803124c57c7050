"""Reading the pickled batches of CIFAR-10 without executing code.

A pickle can call any function by name. Here only four names are allowed, which become inert objects: those that
construct an array (`_reconstruct`, `ndarray`, `dtype`), and `_codecs.encode`, by which Python 3 writes bytes. The
opcodes are checked before anything is built: only those needed for dictionaries, lists, numbers, strings and the array,
no more than a batch has, and none by which a small file could allocate much memory.
"""

import pickle
import pickletools
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from streaming.errors import ServiceError

MAX_BYTES = 64 * 1024**2  # a batch has 31 MB
MAX_OPCODES = 500_000  # a batch has 40,000; Python 3 writes six a file name
MAX_ROWS = 100_000

OPCODES = frozenset(
    {"PROTO", "FRAME", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2"}
    | {"BINSTRING", "SHORT_BINSTRING", "BINUNICODE", "SHORT_BINUNICODE", "BINBYTES", "SHORT_BINBYTES"}
    | {"EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_DICT", "SETITEM", "SETITEMS"}
    | {"EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"}
    | {"GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD"}
    | {"BINPUT", "LONG_BINPUT", "MEMOIZE", "BINGET", "LONG_BINGET"}
)
TUPLES = frozenset({"EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"})


class _Inert:
    """An inert object in place of a name in the pickle, which only stores its arguments."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Array(_Inert):
    """An array to construct; its state is (version, shape, dtype, whether in Fortran order, bytes)."""


class _ArrayType(_Inert):
    """numpy.ndarray, the argument of `_reconstruct`."""


class _DType(_Inert):
    """A dtype."""


class _Encoded(_Inert):
    """Bytes as written by Python 3 at protocol 2: a string in Latin-1."""

    def __hash__(self) -> int:
        return hash(_plain(self))

    def __eq__(self, other: object) -> bool:
        return bool(_plain(self) == other)


NAMES: dict[tuple[str, str], type[_Inert]] = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy", "ndarray"): _ArrayType,
    ("numpy", "dtype"): _DType,
    ("_codecs", "encode"): _Encoded,
}


class _RestrictedUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str, /) -> type[_Inert]:
        if (module, name) not in NAMES:
            raise ServiceError(f"it names {module}.{name}, which no batch of images needs")
        return NAMES[module, name]


class Batch(NamedTuple):
    """The images of one file.

    Attributes:
        data: (N, 3072) uint8, the red, green and blue plane one after the other.
        labels: (N,) from 0 to 9.
        names: (N) file names, or none.
    """

    data: NDArray[np.uint8]
    labels: NDArray[np.int64]
    names: list[str]


def read_pickle(path: Path) -> dict[str, Any]:
    """Read the dictionary in `path`, of strings, numbers, lists and arrays to construct.

    Raises:
        ServiceError: the file is too large, refers to other names, or is not such a pickle.
    """
    with _errors_named(path):
        content = _read(path)
        _check_opcodes(content)
        return _dictionary(_RestrictedUnpickler(BytesIO(content), encoding="bytes").load())


def read_batch(path: Path, width: int, n_classes: int) -> Batch:
    """Read a batch of images of `width` values.

    Raises:
        ServiceError: as `read_pickle`, or the dictionary is not a batch.
    """
    found = read_pickle(path)
    with _errors_named(path):
        data = _array(found.get("data"), width)
        labels = _list(found, "labels", len(data))
        names = _list(found, "filenames", len(data)) if "filenames" in found else []
        return Batch(data, _numbers(labels, n_classes), [_text(name) for name in names])


def read_names(path: Path) -> list[str]:
    """Read the class names in `batches.meta`; raises as `read_pickle`."""
    found = read_pickle(path)
    with _errors_named(path):
        return [_text(name) for name in _list(found, "label_names")]


@contextmanager
def _errors_named(path: Path) -> Iterator[None]:
    """Report errors of the block in one line that names the file."""
    try:
        yield
    except ServiceError as error:
        raise ServiceError(f"{path} is not a file of CIFAR-10's python version: {error}") from error
    except OSError:
        raise
    except Exception as error:  # invalid pickles raise exceptions of any type
        why = f"{type(error).__name__}: {error}"
        raise ServiceError(f"{path} is not a file of CIFAR-10's python version ({why})") from error


def _dictionary(found: Any) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise ServiceError(f"it holds a {type(found).__name__}, expected a dictionary")
    return {_text(key): value for key, value in found.items()}


def _list(found: dict[str, Any], key: str, length: int | None = None) -> list[Any]:
    values = found.get(key)
    if not isinstance(values, list) or length not in (None, len(values)):
        raise ServiceError(
            f"expected a list {key}" + (f" of {length:,}, as many as there are images" if length else "")
        )
    return values


def _numbers(labels: list[Any], n_classes: int) -> NDArray[np.int64]:
    if not all(type(label) is int and 0 <= label < n_classes for label in labels):
        raise ServiceError(f"its labels are not numbers from 0 to {n_classes - 1}")
    return np.array(labels, np.int64)


def _read(path: Path) -> bytes:
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise ServiceError(f"it has {size:,} bytes, at most {MAX_BYTES:,} are read")
    return path.read_bytes()


def _check_opcodes(content: bytes) -> None:
    """Check the opcodes of a pickle before anything is built.

    Memo indices are bounded, because the unpickler allocates up to the highest. Tuples must not be reused, because the
    time to hash nested tuples doubles with each level that contains another twice.
    """
    tuples: set[int] = set()
    memoized = 0
    before = ""
    for count, (opcode, argument, _) in enumerate(pickletools.genops(content)):
        name = opcode.name
        if name not in OPCODES or count == MAX_OPCODES:
            what = f"the opcode {name}" if name not in OPCODES else f"more than {MAX_OPCODES:,} opcodes"
            raise ServiceError(f"it has {what}, which no batch of images needs")
        if name in {"BINPUT", "LONG_BINPUT", "MEMOIZE"}:
            place = memoized if argument is None else int(argument)
            memoized += 1
            if place > MAX_OPCODES:
                raise ServiceError(f"it memoizes at place {place:,}, at most {MAX_OPCODES:,} are allowed")
            if before in TUPLES:
                tuples.add(place)
        elif name in {"BINGET", "LONG_BINGET"} and argument in tuples:
            raise ServiceError("it uses a tuple twice, which no batch of images does")
        before = name


def _array(recipe: Any, width: int) -> NDArray[np.uint8]:
    """Construct the array (N, width) of uint8."""
    match recipe:
        case _Array(
            state=(int(), (int(rows), int(columns)), _DType(arguments=(kind, *_)), bool() | int() as fortran, data)
        ):
            values = _plain(data)
            if _text(kind) not in {"u1", "|u1"} or columns != width or not 0 < rows <= MAX_ROWS:
                raise ServiceError(f"its data is {rows:,} × {columns:,} {_text(kind)}, expected N × {width:,} u1")
            if not isinstance(values, bytes) or len(values) != rows * columns:
                raise ServiceError(f"its data has another size than {rows:,} × {columns:,} bytes")
            return np.frombuffer(values, np.uint8).reshape((rows, columns), order="F" if fortran else "C")
    raise ServiceError("it has no array of images under the key data")


def _plain(value: Any) -> Any:
    """The bytes of an encoded string, or the value itself."""
    match value:
        case _Encoded(arguments=(str(text), "latin1" | "latin-1" | b"latin1")):
            return text.encode("latin-1")
    return value


def _text(value: Any) -> str:
    plain = _plain(value)
    if isinstance(plain, bytes):
        return plain.decode("utf-8", "replace")
    if isinstance(plain, str):
        return plain
    raise ServiceError(f"it has a value of type {type(plain).__name__} where text is expected")
