"""Malicious and damaged bundles: each is refused with a reason before it is used."""

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from models.arrays import read_npz, write_npz
from models.backbone import FLATBUFFER_FILE, WEIGHTS_FILE
from models.bundle import CLASSIFIER, FILES, GOLDEN, MANIFEST, PROJECTION, read_bundle
from models.errors import ModelError
from models.scorer import check_golden, load_scorer
from streaming.registry import open_registry
from tests.forms import Form, Record
from tests.models.samples import copy_bundle, replace_file, seal
from tests.streaming.small_models import bundle_folder

Change = Callable[[Path], None]


class Trap:
    """Creates a folder in the working directory if it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("unpickled",)


def use(bundle: Path) -> None:
    """All that the stream does before it predicts with a model."""
    content = read_bundle(bundle)
    check_golden(content, load_scorer(content))


def _content(bundle: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((bundle / MANIFEST).read_bytes())
    return content


def _file(name: str, make: Callable[[bytes], bytes], *, sealed: bool = True) -> Change:
    """A file with other content; `sealed` updates its hash in the manifest."""

    def change(bundle: Path) -> None:
        replace_file(bundle, name, make((bundle / name).read_bytes()))
        if sealed:
            seal(bundle)

    return change


def _arrays(name: str, **changes: Callable[[np.ndarray], np.ndarray]) -> Change:
    """An npz with some of its arrays changed and the manifest updated."""

    def make(data: bytes) -> bytes:
        arrays = read_npz(data, name)
        return write_npz(arrays | {key: change(arrays[key].copy()) for key, change in changes.items()})

    return _file(name, make)


def _one(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def put(array: np.ndarray) -> np.ndarray:
        array.flat[0] = value
        return array

    return put


def _fields(**fields: Any) -> Change:
    return lambda bundle: seal(bundle, **fields)


def _renamed(new: str) -> Change:
    """A manifest with another path for a file, which contains the same bytes."""

    def change(bundle: Path) -> None:
        content = _content(bundle)
        content["files"][new] = content["files"].pop(CLASSIFIER)
        replace_file(bundle, MANIFEST, json.dumps(content).encode())
        if not new.startswith("/"):
            target = bundle / new
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((bundle / CLASSIFIER).read_bytes())
        (bundle / CLASSIFIER).unlink()

    return change


def _swapped(one: str, other: str, *, sealed: bool) -> Change:
    def change(bundle: Path) -> None:
        first, second = (bundle / one).read_bytes(), (bundle / other).read_bytes()
        replace_file(bundle, one, second)
        replace_file(bundle, other, first)
        if sealed:
            seal(bundle)

    return change


def _replaced(name: str, make: Callable[[Path], object]) -> Change:
    """Something else under the name of a file."""

    def change(bundle: Path) -> None:
        (bundle / name).rename(bundle.parent / "moved")
        make(bundle / name)

    return change


def _npz(**members: bytes) -> bytes:
    """An npz with these members."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return stream.getvalue()


def _objects(_: bytes) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, coefficients=np.array([Trap()], dtype=object), intercept=np.zeros(10, np.float32))
    return stream.getvalue()


def _header(shape: str) -> bytes:
    """The header of an .npy file that declares an array of this shape, without data."""
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header


def _bomb() -> bytes:
    """An npz of a hundred bytes whose directory declares 4 GB."""
    data = _npz(**{"coefficients.npy": _header("(1000000000,)")})
    size = data.index(b"PK\x01\x02") + 24
    return data[:size] + b"\xff\xff\xff\xfe"[::-1] + data[size + 4 :]


def _missing_field(name: str) -> Change:
    def change(bundle: Path) -> None:
        content = _content(bundle)
        del content[name]
        replace_file(bundle, MANIFEST, json.dumps(content).encode())

    return change


def _other_weights(data: bytes) -> bytes:
    """The flatbuffer with some weights set to zero: it loads and runs but computes other values."""
    middle = len(data) // 2
    return data[:middle] + bytes(200_000) + data[middle + 200_000 :]


def _wider(array: np.ndarray) -> np.ndarray:
    return np.hstack([array, array])


HOSTILE: dict[str, Change] = {
    "pickled objects in an npz": _file(CLASSIFIER, _objects),
    "a pickle named as an npz": _file(CLASSIFIER, lambda _: pickle.dumps(Trap())),
    "a pickle inside an npz": _file(CLASSIFIER, lambda _: _npz(**{"coefficients.npy": pickle.dumps(Trap())})),
    "an additional pickle": lambda bundle: (bundle / "model.pkl").write_bytes(pickle.dumps(Trap())) and None,
    "an additional Python file": lambda bundle: (bundle / "__init__.py").write_text("raise SystemExit") and None,
    "path traversal in the manifest": _renamed("../classifier.npz"),
    "an absolute path in the manifest": _renamed("/etc/passwd"),
    "a subfolder in the manifest": _renamed("sub/classifier.npz"),
    "path traversal inside an npz": _file(CLASSIFIER, lambda _: _npz(**{"../../coefficients.npy": _header("(1,)")})),
    "a wrong hash": _file(GOLDEN, lambda data: data[:-1] + b"\1", sealed=False),
    "a hash in upper case": lambda bundle: replace_file(
        bundle,
        MANIFEST,
        json.dumps(_content(bundle) | {"files": {k: v.upper() for k, v in _content(bundle)["files"].items()}}).encode(),
    ),
    "two files swapped": _swapped(PROJECTION, CLASSIFIER, sealed=False),
    "two files swapped, correct hashes": _swapped(PROJECTION, CLASSIFIER, sealed=True),
    "golden and classifier swapped, correct hashes": _swapped(GOLDEN, CLASSIFIER, sealed=True),
    "flatbuffer and weights swapped, correct hashes": _swapped(FLATBUFFER_FILE, WEIGHTS_FILE, sealed=True),
    "NaN in the weights": _arrays(CLASSIFIER, coefficients=_one(np.nan)),
    "infinity in the weights": _arrays(PROJECTION, components=_one(np.inf)),
    "other weights in the classifier": _arrays(CLASSIFIER, intercept=_one(30.0)),
    "other weights in the backbone": _file(FLATBUFFER_FILE, _other_weights),
    "weights of double width": _arrays(CLASSIFIER, coefficients=_wider),
    "weights as float64": _arrays(PROJECTION, components=lambda array: array.astype(np.float64)),
    "weights as text": _arrays(CLASSIFIER, intercept=lambda array: array.astype(str)),
    "huge dimensions in the manifest": _fields(projection__n_out=10**6, classifier__n_in=10**6),
    "overflowing dimensions in the manifest": _fields(projection__n_out=10**18),
    "negative dimensions in the manifest": _fields(classifier__n_out=-10),
    "an input size of gigapixels": _fields(backbone__input_size=[10**6, 10**6]),
    "an array that declares terabytes": _file(
        CLASSIFIER, lambda _: _npz(**{"coefficients.npy": _header("(1000000000000,)")})
    ),
    "an array of negative shape": _file(CLASSIFIER, lambda _: _npz(**{"coefficients.npy": _header("(-1, 5)")})),
    "code as a shape": _file(CLASSIFIER, lambda _: _npz(**{"coefficients.npy": _header("(__import__('os'),)")})),
    "a zip bomb as an npz": _file(CLASSIFIER, lambda _: _bomb()),
    "an empty npz": _file(PROJECTION, lambda _: write_npz({})),
    "a flatbuffer of zeros": _file(FLATBUFFER_FILE, lambda data: bytes(len(data))),
    "a truncated flatbuffer": _file(FLATBUFFER_FILE, lambda data: data[: len(data) // 2]),
    "an empty flatbuffer": _file(FLATBUFFER_FILE, lambda _: b""),
    "changed golden answers": _arrays(GOLDEN, probabilities=lambda array: array[:, ::-1]),
    "NaN in the golden answers": _arrays(GOLDEN, probabilities=_one(np.nan)),
    "zeros as golden images": _arrays(GOLDEN, data=np.zeros_like),
    "golden lengths larger than the data": _arrays(GOLDEN, lengths=lambda array: array * 10),
    "no golden images": _arrays(GOLDEN, lengths=lambda a: a[:0], data=lambda a: a[:0], probabilities=lambda a: a[:0]),
    "an unlimited tolerance": _fields(golden_tolerance=1.0),
    "an engine that unpickles": _fields(backbone__engine="pickle"),
    "a classifier of unknown kind": _fields(classifier__kind="lambda"),
    "an additional field": _fields(on_load="os.system"),
    "another schema version": _fields(schema_version=2),
    "duplicate class names": _fields(classes=["0"] * 10),
    "no classes": _fields(classes=[]),
    "NaN as a metric": _fields(metrics={"accuracy": float("nan")}),
    "no list of files": _missing_field("files"),
    "an empty manifest": lambda bundle: replace_file(bundle, MANIFEST, b""),
    "a deeply nested manifest": lambda bundle: replace_file(bundle, MANIFEST, b'{"a":' * 100_000),
    "a link to the correct file": _replaced(CLASSIFIER, lambda path: path.symlink_to(path.parent.parent / "moved")),
    "a link to the correct manifest": _replaced(MANIFEST, lambda path: path.symlink_to(path.parent.parent / "moved")),
    "a link to a device": _replaced(GOLDEN, lambda path: path.symlink_to("/dev/zero")),
    "a pipe without a writer": _replaced(GOLDEN, os.mkfifo),
    "a folder instead of a file": _replaced(PROJECTION, lambda path: path.mkdir()),
    "a missing file": _replaced(PROJECTION, lambda _: None),
}  # fmt: skip


@pytest.fixture(scope="module")
def valid(trained: Path) -> Path:
    """A bundle that is accepted."""
    bundle = bundle_folder(trained, 1)
    use(bundle)
    return bundle


@pytest.fixture(scope="module")
def refused_kinds(record: Record) -> Iterator[set[str]]:
    """The refused kinds; their number is recorded at the end."""
    kinds: set[str] = set()
    yield kinds
    record("hostile bundles: kinds refused", "all, ≥ 25", f"{len(kinds)} of {len(HOSTILE)}")


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_bundle_is_refused(
    valid: Path, tmp_path: Path, kind: str, refused_kinds: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    bundle = copy_bundle(valid, tmp_path / "bundle")
    HOSTILE[kind](bundle)
    with pytest.raises(ModelError) as refusal:
        use(bundle)
    assert str(refusal.value).strip()
    assert not (tmp_path / "unpickled").exists()
    refused_kinds.add(kind)


def test_any_changed_byte_of_a_registered_bundle_is_refused(
    valid: Path, tmp_path: Path, rng: Random, form: Form[int], record: Record
) -> None:
    def make(bundle: Path) -> None:
        copy_bundle(valid, bundle)
        replace_file(bundle, GOLDEN, (valid / GOLDEN).read_bytes())  # not a link, because its bytes are changed
        for name in FILES - {GOLDEN}:
            replace_file(bundle, name, name.encode())  # small, because reading only hashes them
        seal(bundle)

    registry = open_registry(tmp_path)
    version = registry.register(make)
    bundle, refused = bundle_folder(tmp_path, version), 0
    for name in sorted(FILES | {MANIFEST}):
        content = (bundle / name).read_bytes()
        with (bundle / name).open("r+b", buffering=0) as file:
            for position, byte in enumerate(content):
                for _ in range(form(8, 1)):
                    os.pwrite(file.fileno(), bytes([byte ^ rng.randrange(1, 256)]), position)
                    with pytest.raises(ModelError, match="."):
                        registry.read(version)
                    refused += 1
                os.pwrite(file.fileno(), bytes([byte]), position)
    registry.read(version)
    record("hostile bundles: single bytes changed", "all refused", f"{refused:,} of {refused:,} refused")


def test_changed_byte_in_a_large_file_is_refused(valid: Path, tmp_path: Path, rng: Random, form: Form[int]) -> None:
    bundle = copy_bundle(valid, tmp_path / "bundle")
    for name in (FLATBUFFER_FILE, WEIGHTS_FILE, PROJECTION, CLASSIFIER):
        replace_file(bundle, name, (valid / name).read_bytes())
        with (bundle / name).open("r+b", buffering=0) as file:
            for _ in range(form(500, 5)):
                position = rng.randrange((bundle / name).stat().st_size)
                (byte,) = os.pread(file.fileno(), 1, position)
                os.pwrite(file.fileno(), bytes([byte ^ rng.randrange(1, 256)]), position)
                with pytest.raises(ModelError, match=f"{name} has SHA-256"):
                    read_bundle(bundle)
                os.pwrite(file.fileno(), bytes([byte]), position)
