"""The `.npz` reader: it accepts plain arrays only, for arbitrary bytes."""

import io
import struct
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models import arrays as arrays_module
from models.arrays import read_npz, write_npz
from models.errors import ModelError

WHOLE = write_npz({"a": np.arange(12.0).reshape(3, 4), "b": np.ones(5, np.float32)})


def npz_of(member: bytes, name: str = "a.npy", compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr(name, member)
    return buffer.getvalue()


def npy_with_header(header: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode()


def npy_with_shape(shape: str) -> bytes:
    return npy_with_header(f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}\n")


def pickled() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, a=np.array([{"any": "object"}], dtype=object))
    return buffer.getvalue()


def test_arrays_round_trip() -> None:
    arrays = read_npz(WHOLE, "x.npz")
    assert list(arrays) == ["a", "b"]
    assert arrays["b"].dtype == np.float32
    np.testing.assert_array_equal(arrays["a"], np.arange(12.0).reshape(3, 4))
    assert read_npz(write_npz({}), "x.npz") == {}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (pickled(), "Object arrays cannot be loaded"),
        (b"", "not a zip file"),
        (WHOLE[:-30], "not a zip file"),
        (npz_of(b"text", "a.npy"), "'a' is not an array"),
        (npz_of(npy_with_header("((((")), "EOF in multi-line statement"),
        (npz_of(npy_with_shape("(-5,)")), "negative dimensions"),
        (npz_of(npy_with_shape("(1000000000000000,)")), "Unable to allocate"),
        (npz_of(npy_with_shape(f"({10**30},)")), "too large"),
        (npz_of(npy_with_shape("(3,)")), "EOF: reading array data"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_invalid_arrays_are_rejected_with_the_file_name(data: bytes, reason: str) -> None:
    with pytest.raises(ModelError, match=f"projection.npz is not a readable npz without pickles: .*{reason}"):
        read_npz(data, "projection.npz")


def test_zip_bomb_is_rejected_before_decompression(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays_module, "MAX_ARRAY_BYTES", 10_000_000)
    bomb = npz_of(npy_with_shape("(1250001,)") + bytes(10_000_008))
    assert len(bomb) < 20_000
    with pytest.raises(ModelError, match=r"x.npz decompresses to 10,000,\d{3} bytes, the limit is 10,000,000"):
        read_npz(bomb, "x.npz")


COMPRESSED = npz_of(npy_with_shape("(100,)") + np.sin(np.arange(100.0)).tobytes())


@settings(max_examples=300, deadline=None, database=None)
@given(
    data=st.sampled_from([WHOLE, COMPRESSED]),
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4),
)
def test_corrupted_bytes_are_harmless_or_rejected(data: bytes, changes: list[tuple[float, int]]) -> None:
    damaged = bytearray(data)
    for place, value in changes:
        damaged[int(place * len(damaged))] = value
    try:
        arrays = read_npz(bytes(damaged), "x.npz")
    except ModelError:
        return
    assert all(isinstance(array, np.ndarray) and not array.dtype.hasobject for array in arrays.values())


def test_npy_file_with_an_appended_npz_is_rejected() -> None:
    single = io.BytesIO()
    np.save(single, np.zeros(3, np.float32))
    with pytest.raises(ModelError, match="weights.npz is not a readable npz .* not a zip file"):
        read_npz(single.getvalue() + write_npz({"mean": np.zeros(3, np.float32)}), "weights.npz")
