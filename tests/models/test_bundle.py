"""Bundles: written and read back, and rejected with the reason if a file is missing, altered or unexpected."""

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from samples import copy_bundle, replace_file, seal, tiny_bundle, tiny_manifest

from models import bundle as bundle_module
from models.arrays import write_npz
from models.backbone import FLATBUFFER_FILE, WEIGHTS_FILE, file_sha256
from models.bundle import (
    CLASSIFIER,
    FILES,
    GOLDEN,
    MANIFEST,
    PROJECTION,
    Manifest,
    StageEntry,
    parse_manifest,
    read_bundle,
    read_manifest,
    write_bundle,
)
from models.errors import ModelError


@pytest.fixture(scope="session")
def manifest() -> Manifest:
    """The manifest of a model with ten classes."""
    tiny = tiny_manifest()
    return tiny.model_copy(
        update={
            "backbone": tiny.backbone.model_copy(update={"n_features": 1280}),
            "projection": StageEntry(kind="pca", n_in=1280, n_out=20),
            "classifier": StageEntry(kind="logistic_regression", n_in=20, n_out=10),
            "classes": tuple("0123456789"),
        }
    )


@pytest.fixture(scope="session")
def bundle_dir(manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete bundle of a few bytes: `read_bundle` does not parse its files."""
    return tiny_bundle(tmp_path_factory.mktemp("bundle") / "whole", **dict(manifest))


def content_of(bundle: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((bundle / MANIFEST).read_bytes())
    return content


def test_bundle_round_trips(bundle_dir: Path, manifest: Manifest) -> None:
    bundle = read_bundle(bundle_dir)
    assert bundle.manifest.model_copy(update={"files": {}}) == manifest
    assert bundle.sha256 == file_sha256(bundle_dir / MANIFEST)
    assert bundle.backbone_sha256 == file_sha256(bundle_dir / FLATBUFFER_FILE)
    assert bundle.projection_sha256 == file_sha256(bundle_dir / PROJECTION)
    assert bundle.manifest.files == {name: file_sha256(bundle_dir / name) for name in FILES}
    assert set(bundle.files) == FILES - {WEIGHTS_FILE}
    np.testing.assert_array_equal(bundle.arrays(PROJECTION)["values"], [0, 1])
    np.testing.assert_array_equal(bundle.arrays(CLASSIFIER)["values"], [0, 1, 2])


def test_copies_of_a_bundle_have_the_same_hash(bundle_dir: Path, bundle_copy: Path) -> None:
    assert read_bundle(bundle_copy).sha256 == read_bundle(bundle_dir).sha256
    seal(bundle_copy, metrics={"accuracy": 0.91})
    assert read_bundle(bundle_copy).sha256 != read_bundle(bundle_dir).sha256


def test_existing_bundle_is_not_overwritten(bundle_dir: Path, manifest: Manifest) -> None:
    before = read_bundle(bundle_dir).sha256
    with pytest.raises(FileExistsError):
        write_bundle(bundle_dir, manifest, {}, {})
    assert read_bundle(bundle_dir).sha256 == before


def test_incomplete_bundle_gets_no_manifest(tmp_path: Path, manifest: Manifest) -> None:
    with pytest.raises(ModelError, match="the manifest should list the files"):
        write_bundle(tmp_path / "new", manifest, {}, {PROJECTION: {}})
    assert not (tmp_path / "new" / MANIFEST).exists()


def test_threshold_is_optional_and_validated(bundle_copy: Path) -> None:
    assert "threshold" not in content_of(bundle_copy)  # as in bundles from before thresholds existed
    assert read_bundle(bundle_copy).manifest.threshold is None
    with pytest.raises(ModelError, match="a threshold requires two classes, there are 10"):
        parse_manifest(json.dumps(content_of(bundle_copy) | {"threshold": 0.3}).encode())
    two = content_of(bundle_copy) | {"classes": ["no", "yes"]}
    two["classifier"]["n_out"] = 2
    assert parse_manifest(json.dumps(two | {"threshold": 0.3}).encode()).threshold == 0.3
    for wrong in (0, 1, -0.5, "half", float("nan")):
        with pytest.raises(ModelError, match="threshold"):
            parse_manifest(json.dumps(two | {"threshold": wrong}).encode())


@pytest.mark.parametrize("name", sorted(FILES))
@pytest.mark.parametrize("damage", ["bit flip", "truncated", "extended"])
def test_altered_file_is_rejected_by_name(bundle_copy: Path, name: str, damage: str) -> None:
    content = bytearray((bundle_copy / name).read_bytes())
    match damage:
        case "bit flip":
            content[len(content) // 2] ^= 1
        case "truncated":
            del content[-1]
        case "extended":
            content.append(0)
    replace_file(bundle_copy, name, content)
    with pytest.raises(ModelError, match=rf"bundle .* is refused: {name} has SHA-256 \w+, the manifest says"):
        read_bundle(bundle_copy)


@pytest.mark.parametrize("name", sorted(FILES))
def test_missing_file_is_rejected(bundle_copy: Path, name: str) -> None:
    (bundle_copy / name).unlink()
    with pytest.raises(ModelError, match=r"expected the files .* and the manifest, found"):
        read_bundle(bundle_copy)


@pytest.mark.parametrize("name", ["extra.pkl", "__init__.py", ".hidden"])
def test_extra_file_is_rejected_by_name(bundle_copy: Path, name: str) -> None:
    (bundle_copy / name).touch()
    with pytest.raises(ModelError, match=f"expected the files .* found .*{name}"):
        read_bundle(bundle_copy)


@pytest.mark.parametrize("name", [MANIFEST, *sorted(FILES)])
def test_symlink_is_rejected_even_if_the_content_matches(bundle_dir: Path, bundle_copy: Path, name: str) -> None:
    (bundle_copy / name).unlink()
    (bundle_copy / name).symlink_to(bundle_dir / name)
    with pytest.raises(ModelError, match=f"{name} is not a regular file"):
        read_bundle(bundle_copy)


def test_directory_instead_of_a_file_is_rejected(bundle_copy: Path) -> None:
    (bundle_copy / PROJECTION).unlink()
    (bundle_copy / PROJECTION).mkdir()
    with pytest.raises(ModelError, match=f"{PROJECTION} is not a regular file"):
        read_bundle(bundle_copy)


def test_directory_without_a_bundle_is_rejected(tmp_path: Path) -> None:
    for directory in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ModelError, match=r"is refused: manifest\.json is not a regular file"):
            read_bundle(directory)


@pytest.mark.parametrize("name", ["../projection.npz", "/etc/passwd", "sub/projection.npz", "projection.npz/.."])
def test_manifest_cannot_list_files_outside_the_bundle(bundle_copy: Path, name: str) -> None:
    files = content_of(bundle_copy)["files"]
    files[name] = files.pop(PROJECTION)
    replace_file(bundle_copy, MANIFEST, json.dumps(content_of(bundle_copy) | {"files": files}).encode())
    with pytest.raises(ModelError, match="the manifest should list the files"):
        read_bundle(bundle_copy)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"schema_version": 2}, "schema_version: Input should be 1"),
        ({"surprise": 1}, "surprise: Extra inputs are not permitted"),
        ({"backbone__lambda": "x"}, "backbone.lambda: Extra inputs are not permitted"),
        ({"backbone__engine": "pickle"}, "backbone.engine: Input should be 'litert', 'keras' or 'onnx'"),
        ({"backbone__input_size": [224]}, "backbone.input_size.1: Field required"),
        ({"backbone__input_size": [224, 10**9]}, "backbone.input_size.1: .* less than or equal to 1000000"),
        ({"backbone__scale": float("nan")}, "backbone.scale: Input should be a finite number"),
        ({"backbone__n_features": 0}, "backbone.n_features: .* greater than 0"),
        ({"backbone__n_features": 640}, "projection.n_in is 1280, but backbone.n_features is 640"),
        ({"projection": None}, "projection: Input should be"),
        ({"projection__n_out": 7}, r"classifier.n_in is \d+, but projection.n_out is 7"),
        ({"classifier__n_out": "many"}, "classifier.n_out: Input should be a valid integer"),
        ({"classifier__n_out": 9}, "classifier.n_out is 9, but the number of classes is 10"),
        ({"classes": [*"0123456788"]}, "class names are not unique"),
        ({"classes": ["0"]}, "classes: .* at least 2 items"),
        ({"classes": list(range(10))}, "classes.0: Input should be a valid string"),
        ({"classes": "0123456789"}, "classes: Input should be a valid tuple"),
        ({"metrics": {"accuracy": "good"}}, "metrics.accuracy: Input should be a valid number"),
        ({"golden_tolerance": 1.0}, "golden_tolerance: Input should be less than or equal to 0.05"),
        ({"training_data__fingerprint": "abc"}, "training_data.fingerprint: String should match pattern"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(value),
)
def test_invalid_manifest_field_is_rejected(bundle_copy: Path, fields: dict[str, Any], reason: str) -> None:
    seal(bundle_copy, **fields)
    with pytest.raises(ModelError, match=reason):
        read_bundle(bundle_copy)


@pytest.mark.parametrize("field", ["backbone", "projection", "classifier", "classes", "metrics", "training_data"])
def test_missing_manifest_field_is_named(bundle_dir: Path, field: str) -> None:
    content = content_of(bundle_dir)
    del content[field]
    with pytest.raises(ModelError, match=f"manifest.json: {field}: Field required"):
        parse_manifest(json.dumps(content).encode())


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"null",
        b"[]",
        b"[" * 100_000,
        b"1" * 5_000,
        b'{"schema_version": ' + b"1" * 5_000 + b"}",
    ],
    ids=["empty", "truncated", "not UTF-8", "null", "list", "deeply nested", "huge number", "huge number in a field"],
)
def test_manifest_that_is_not_a_json_object_is_rejected(text: bytes) -> None:
    with pytest.raises(ModelError, match=r"^manifest\.json"):
        parse_manifest(text)


def test_oversized_manifest_is_rejected_before_reading(bundle_copy: Path) -> None:
    (bundle_copy / MANIFEST).unlink()
    with (bundle_copy / MANIFEST).open("wb") as file:
        file.truncate(bundle_module.MAX_MANIFEST_BYTES + 1)
    with pytest.raises(ModelError, match=r"manifest\.json has 16,777,217 bytes, more than the 16,777,216 allowed"):
        read_bundle(bundle_copy)


def test_oversized_file_is_rejected_before_reading(bundle_copy: Path) -> None:
    for name in (PROJECTION, WEIGHTS_FILE):
        bundle = copy_bundle(bundle_copy, bundle_copy.with_name(f"huge {name}"))
        replace_file(bundle, name, b"")
        with (bundle / name).open("wb") as file:
            file.truncate(bundle_module.MAX_FILE_BYTES + 1)
        with pytest.raises(ModelError, match=f"{name} has 2,147,483,649 bytes, more than the 2,147,483,648 allowed"):
            read_bundle(bundle)


def test_seal_makes_hashes_valid(bundle_copy: Path) -> None:
    """Tests that modify bundles rely on this: the hash must not be the reason for the rejection."""
    replace_file(bundle_copy, PROJECTION, write_npz({}))
    seal(bundle_copy)
    assert read_bundle(bundle_copy).arrays(PROJECTION) == {}


def test_write_bundle_creates_parent_directories_and_returns_the_manifest_hash(tmp_path: Path) -> None:
    whole = tiny_bundle(tmp_path / "whole")
    backbone = {name: whole / name for name in (FLATBUFFER_FILE, WEIGHTS_FILE)}
    directory = tmp_path / "new" / "folder" / "bundle"
    arrays = {name: {"values": np.arange(2)} for name in (PROJECTION, CLASSIFIER, GOLDEN)}
    sha256 = write_bundle(directory, tiny_manifest(), backbone, arrays)
    assert sha256 == file_sha256(directory / MANIFEST) == read_bundle(directory).sha256
    text = (directory / MANIFEST).read_text(encoding="utf-8")
    assert text == json.dumps(json.loads(text), indent=2, ensure_ascii=False, sort_keys=True) + "\n"


@dataclass
class InMemory:
    """A bundle in memory that records which files are read."""

    content: dict[str, bytes]
    reads: list[str]

    def __str__(self) -> str:
        return "s3://bucket/models/7"

    def names(self) -> Collection[str]:
        return self.content.keys()

    def size(self, name: str) -> int:
        if name not in self.content:
            raise ModelError(f"{name} is missing")
        return len(self.content[name])

    def read(self, name: str) -> bytes:
        self.reads.append(name)
        return self.content[name]


@pytest.fixture
def in_memory(bundle_dir: Path) -> InMemory:
    return InMemory({path.name: path.read_bytes() for path in bundle_dir.iterdir()}, [])


def test_bundle_is_read_from_memory_as_from_a_directory(bundle_dir: Path, in_memory: InMemory) -> None:
    assert read_bundle(in_memory) == read_bundle(bundle_dir)
    assert sorted(in_memory.reads) == sorted([MANIFEST, *FILES]), "each file is read once"


def test_read_manifest_reads_only_the_manifest_and_returns_its_hash(bundle_dir: Path, in_memory: InMemory) -> None:
    bundle = read_bundle(bundle_dir)
    assert read_manifest(in_memory) == (bundle.manifest, bundle.sha256)
    assert in_memory.reads == [MANIFEST]


@pytest.mark.parametrize("name", ["extra.pkl", "sub/projection.npz", "../projection.npz", "/etc/passwd", ""])
def test_extra_file_in_memory_is_rejected_without_reading_others(in_memory: InMemory, name: str) -> None:
    in_memory.content[name] = b"more"
    with pytest.raises(ModelError, match=r"bundle s3://bucket/models/7 is refused: expected the files"):
        read_bundle(in_memory)
    assert in_memory.reads == [MANIFEST]


@pytest.mark.parametrize("name", sorted(FILES))
def test_missing_or_altered_file_in_memory_is_rejected_by_name(in_memory: InMemory, name: str) -> None:
    whole = in_memory.content.pop(name)
    with pytest.raises(ModelError, match=r"models/7 is refused: expected the files .* found"):
        read_bundle(in_memory)
    in_memory.content[name] = whole + b"\0"
    with pytest.raises(ModelError, match=rf"models/7 is refused: {name} has SHA-256 \w+, the manifest says"):
        read_bundle(in_memory)


def test_oversized_file_in_memory_is_never_read(in_memory: InMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_module, "MAX_FILE_BYTES", 1)
    with pytest.raises(ModelError, match=r"models/7 is refused: .* more than the 1 allowed"):
        read_bundle(in_memory)
    monkeypatch.setattr(bundle_module, "MAX_MANIFEST_BYTES", 1)
    with pytest.raises(ModelError, match=r"models/7 is refused: manifest\.json has .* more than the 1 allowed"):
        read_bundle(in_memory)
    assert in_memory.reads == [MANIFEST]


def test_bundle_read_from_memory_can_be_copied_to_a_directory(
    bundle_dir: Path, in_memory: InMemory, tmp_path: Path
) -> None:
    bundle = read_bundle(in_memory, copy_to=tmp_path / "copy")
    assert bundle == read_bundle(bundle_dir) == read_bundle(tmp_path / "copy")
    assert {path.name: path.read_bytes() for path in (tmp_path / "copy").iterdir()} == in_memory.content


@pytest.mark.parametrize("name", ["../outside", "sub/more"])
def test_no_file_name_escapes_the_copy_directory(in_memory: InMemory, tmp_path: Path, name: str) -> None:
    in_memory.content[name] = b"more"
    with pytest.raises(ModelError, match="expected the files"):
        read_bundle(in_memory, copy_to=tmp_path / "copy")
    assert list(tmp_path.iterdir()) == []
