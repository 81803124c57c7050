import collections
import io
import pickle
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from models.efficientnet_lite0 import WEIGHTS_SHA256, weights_file
from models.errors import ModelError
from models.torch_file import read_tensors

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
MACHINE = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}


class Named:
    """Pickled as the global `module.name`, which need not exist."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name


class Storage(NamedTuple):
    key: str
    length: int
    type_name: str = "FloatStorage"


class Call:
    """Pickled as the call of a global."""

    def __init__(self, function: Named, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments


class TorchPickler(pickle._Pickler):  # type: ignore[name-defined]  # the pure-Python one lets globals be forged
    def save(self, obj: Any, save_persistent_id: bool = True) -> Any:
        if isinstance(obj, Named):
            self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())
        elif isinstance(obj, Call):
            self.save(obj.function)
            self.save(obj.arguments)
            self.write(pickle.REDUCE)
        elif isinstance(obj, Storage):
            self.save(("storage", Named("torch", obj.type_name), obj.key, "cpu", obj.length, None))
            self.write(pickle.BINPERSID)
        else:
            super().save(obj, save_persistent_id)
        return None


def dump(obj: Any) -> bytes:
    stream = io.BytesIO()
    TorchPickler(stream, protocol=2).dump(obj)
    return stream.getvalue()


def tensor(storage: Storage, offset: Any, shape: Any, strides: Any) -> Call:
    rebuild = Named("torch._utils", "_rebuild_tensor_v2")
    return Call(rebuild, storage, offset, shape, strides, False, collections.OrderedDict())


def torch_file(
    tmp_path: Path, state: Any, storages: dict[str, np.ndarray], magic: int = MAGIC, tail: int | None = None
) -> Path:
    data = dump(magic) + dump(PROTOCOL) + dump(MACHINE) + dump(state) + dump(list(storages))
    for values in storages.values():
        data += struct.pack("<q", values.size) + values.tobytes()
    file = tmp_path / "weights.pth"
    file.write_bytes(data[:tail])
    return file


VALUES = np.arange(24, dtype=np.float32)


def test_strides_and_offsets_are_honoured(tmp_path: Path) -> None:
    storage = Storage("a", 24)
    state = {
        "plain": tensor(storage, 0, (4, 6), (6, 1)),
        "transposed": tensor(storage, 0, (6, 4), (1, 6)),
        "part": tensor(storage, 7, (2, 3), (12, 2)),
        "scalar": tensor(storage, 5, (), ()),
        "empty": tensor(storage, 0, (0, 3), (3, 1)),
    }
    tensors = read_tensors(torch_file(tmp_path, state, {"a": VALUES}))
    matrix = VALUES.reshape(4, 6)
    np.testing.assert_array_equal(tensors["plain"], matrix)
    np.testing.assert_array_equal(tensors["transposed"], matrix.T)
    np.testing.assert_array_equal(tensors["part"], [[7, 9, 11], [19, 21, 23]])
    assert tensors["scalar"] == 5
    assert tensors["empty"].shape == (0, 3)
    assert all(values.flags.c_contiguous and values.flags.owndata for values in tensors.values())


@pytest.mark.parametrize(
    ("type_name", "dtype"),
    [("DoubleStorage", "f8"), ("HalfStorage", "f2"), ("LongStorage", "i8"), ("BoolStorage", "?")],
)
def test_storage_type_determines_the_dtype(tmp_path: Path, type_name: str, dtype: str) -> None:
    state = {"x": tensor(Storage("a", 24, type_name), 0, (24,), (1,))}
    tensors = read_tensors(torch_file(tmp_path, state, {"a": VALUES.astype(dtype)}))
    np.testing.assert_array_equal(tensors["x"], VALUES.astype(dtype))


def test_packaged_weights_are_complete() -> None:
    tensors = read_tensors(weights_file(), WEIGHTS_SHA256)
    assert len(tensors) == 296
    assert tensors["_fc.weight"].shape == (1000, 1280)
    assert all(np.isfinite(values).all() for values in tensors.values())


@pytest.mark.parametrize(
    "function", [("os", "system"), ("builtins", "eval"), ("torch", "load"), ("collections", "namedtuple")], ids=".".join
)
def test_other_globals_are_rejected_before_they_are_called(tmp_path: Path, function: tuple[str, str]) -> None:
    trap = tmp_path / "trap"
    state = {"x": Call(Named(*function), f"touch {trap}")}
    with pytest.raises(ModelError, match=f"it names {function[0]}.{function[1]}"):
        read_tensors(torch_file(tmp_path, state, {}))
    assert not trap.exists()


@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [
        (1, (24,), (1,)),
        (0, (4, 6), (7, 1)),
        (-1, (4,), (1,)),
        (0, (4,), (-1,)),
        (0, (4, 6), (6,)),
        (0, (1000, 1000), (0, 0)),
        (0, ("4",), (1,)),
        (0, (1,) * 9, (1,) * 9),
    ],
)
def test_view_beyond_its_storage_is_rejected(tmp_path: Path, offset: int, shape: Any, strides: Any) -> None:
    state = {"x": tensor(Storage("a", 24), offset, shape, strides)}
    with pytest.raises(ModelError, match="tensor x"):
        read_tensors(torch_file(tmp_path, state, {"a": VALUES}))


def test_storages_that_contradict_the_tensors_are_rejected(tmp_path: Path) -> None:
    state = {"x": tensor(Storage("a", 24), 0, (24,), (1,))}
    for storages in ({"b": VALUES}, {"a": VALUES[:12]}, {}, {"a": VALUES, "b": VALUES}):
        with pytest.raises(ModelError, match="storage"):
            read_tensors(torch_file(tmp_path, state, storages))


def test_truncated_file_is_rejected(tmp_path: Path) -> None:
    state = {"x": tensor(Storage("a", 24), 0, (24,), (1,))}
    whole = len(torch_file(tmp_path, state, {"a": VALUES}).read_bytes())
    for length in range(whole):
        with pytest.raises(ModelError):
            read_tensors(torch_file(tmp_path, state, {"a": VALUES}, tail=length))


@pytest.mark.parametrize("state", [["x"], {"x": 1}, {1: tensor(Storage("a", 1), 0, (), ())}, None])
def test_state_that_is_not_named_tensors_is_rejected(tmp_path: Path, state: Any) -> None:
    with pytest.raises(ModelError, match="dictionary of named tensors"):
        read_tensors(torch_file(tmp_path, state, {}))


def test_wrong_magic_number_hash_or_path_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="magic number"):
        read_tensors(torch_file(tmp_path, {}, {}, magic=1))
    with pytest.raises(ModelError, match="expected 0000"):
        read_tensors(torch_file(tmp_path, {}, {}), sha256="0" * 64)
    (tmp_path / "zip.pth").write_bytes(b"PK\x03\x04")
    with pytest.raises(ModelError, match=r"zip\.pth"):
        read_tensors(tmp_path / "zip.pth")
    with pytest.raises(ModelError, match="No such file"):
        read_tensors(tmp_path / "absent.pth")
