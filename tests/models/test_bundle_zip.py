"""Bundles as zip files: they round-trip, and any other content is rejected."""

import io
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from models.bundle import GOLDEN, MANIFEST, read_bundle
from models.bundle_zip import EPOCH, MAX_ENTRIES, ZipFiles, is_bundle_zip, write_zip
from models.errors import ModelError
from tests.models.samples import tiny_bundle


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return tiny_bundle(tmp_path / "bundle")


def test_zip_round_trips_and_is_reproducible(bundle: Path, tmp_path: Path) -> None:
    for name in ("1.zip", "2.zip"):
        write_zip(bundle, tmp_path / "new" / name)
    one, two = sorted((tmp_path / "new").iterdir())
    assert one.read_bytes() == two.read_bytes()
    assert is_bundle_zip(one)
    assert read_bundle(ZipFiles(one), tmp_path / "copy") == read_bundle(bundle)
    assert read_bundle(tmp_path / "copy") == read_bundle(bundle)


def changed(bundle: Path, change: Callable[[dict[str, bytes]], None]) -> bytes:
    """A zip of the bundle with its files changed."""
    files = {path.name: path.read_bytes() for path in bundle.iterdir()}
    change(files)
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as target:
        for name, content in files.items():
            target.writestr(zipfile.ZipInfo(name, EPOCH), content)
    return stream.getvalue()


def compressed(bundle: Path) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as target:
        for path in bundle.iterdir():
            target.writestr(path.name, path.read_bytes() + bytes(10_000_000 if path.name == GOLDEN else 0))
    return stream.getvalue()


def with_duplicate(bundle: Path) -> bytes:
    stream = io.BytesIO(changed(bundle, lambda _: None))
    with zipfile.ZipFile(stream, "a") as target, pytest.warns(UserWarning, match="Duplicate name"):
        target.writestr(MANIFEST, b"{}")
    return stream.getvalue()


def with_false_size(bundle: Path) -> bytes:
    """A zip whose directory declares four gigabytes for the manifest."""
    whole = bytearray(changed(bundle, lambda _: None))
    place = zipfile.ZipFile(io.BytesIO(whole)).start_dir
    whole[place + 20 : place + 28] = b"\xf0\xff\xff\xff" * 2
    return bytes(whole)


HOSTILE: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "not a zip": (lambda _: b"PK\x03\x04" + bytes(100), "is not a zip of a bundle"),
    "empty": (lambda _: b"", "is not a zip of a bundle"),
    "truncated": (lambda bundle: changed(bundle, lambda _: None)[:-30], "is not a zip of a bundle"),
    "missing beginning": (lambda one: b"x" + changed(one, lambda _: None)[2000:], "larger|cannot be read"),
    "altered file": (lambda bundle: changed(bundle, lambda one: one.update({GOLDEN: b"x"})), "has SHA-256"),
    "missing file": (lambda bundle: changed(bundle, lambda one: one.pop(GOLDEN)), "expected the files"),
    "extra file": (lambda bundle: changed(bundle, lambda one: one.update(evil=b"x")), "expected the files"),
    "path": (lambda bundle: changed(bundle, lambda one: one.update({"../evil": b"x"})), "expected plain file names"),
    "directory": (lambda bundle: changed(bundle, lambda one: one.update({"a/": b""})), "expected plain file names"),
    "too many entries": (
        lambda bundle: changed(bundle, lambda one: one.update({f"f{n}": b"" for n in range(MAX_ENTRIES)})),
        "it has 3. entries",
    ),
    "compressed": (compressed, "is duplicated, encrypted or compressed"),
    "duplicate entry": (with_duplicate, "is duplicated"),
    "false size": (with_false_size, "claims to be larger"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_invalid_zip_is_rejected(name: str, bundle: Path, tmp_path: Path) -> None:
    make, reason = HOSTILE[name]
    file = tmp_path / "hostile.zip"
    file.write_bytes(make(bundle))
    with pytest.raises(ModelError, match=reason):
        read_bundle(ZipFiles(file), tmp_path / "copy")
    assert not (tmp_path / "evil").exists()


def test_other_zip_files_are_not_recognised_as_bundles(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "net.keras", "w") as target:
        target.writestr("config.json", "{}")
    assert not is_bundle_zip(tmp_path / "net.keras")
    assert not is_bundle_zip(tmp_path / "absent")
    assert not is_bundle_zip(tmp_path)
