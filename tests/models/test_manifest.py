"""The limits of manifest fields, and the checks of `read_bundle`, on bundles of a few bytes."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from samples import replace_file, seal, tiny_bundle, tiny_manifest

from models import bundle as bundle_module
from models.architectures import BACKBONES
from models.backbone import FLATBUFFER_FILE, WEIGHTS_FILE, ExportedBackbone, file_sha256
from models.bundle import (
    DRIFT,
    FILES,
    GOLDEN,
    HEAD_FILES,
    MANIFEST,
    BackboneEntry,
    BundleFolder,
    Manifest,
    StageEntry,
    TrainingData,
    parse_manifest,
    read_bundle,
    read_manifest,
)
from models.errors import ModelError
from models.network import Network
from models.recipe import Recipe

HASHES = dict.fromkeys(FILES, "0" * 64)


def parsed(**fields: Any) -> Manifest:
    """A parsed manifest with some fields replaced (`stage__field` for a field of a stage)."""
    content = tiny_manifest(files=HASHES).model_dump(mode="json", exclude_none=True)
    for name, value in fields.items():
        *stage, field = name.split("__")
        (content[stage[0]] if stage else content)[field] = value
    return parse_manifest(json.dumps(content).encode())


def wide(width: int) -> dict[str, Any]:
    """The fields that must equal the width of the backbone."""
    return {"backbone__n_features": width, "projection__n_in": width}


@pytest.mark.parametrize(
    "fields",
    [
        wide(1),
        wide(1_000_000),
        {"backbone__input_size": [1, 1_000_000]},
        {"backbone__parity": 0},
        {"backbone__cosine": 1.001},
        {"backbone__cosine": -1},
        {"golden_tolerance": 0.05},
        {"golden_tolerance": 1e-9},
        {"training_data__rows": 0, "training_data__holdout_rows": 0},
        {"training_data__holdout_share": 0.001},
        {"training_data__holdout_share": 0.999},
        {"training_data__group_by": "g" * 1_000},
        {"classes": ["a", "b"], "classifier__n_out": 2, "threshold": 0.001},
        {"classes": ["a", "b"], "classifier__n_out": 2, "threshold": 0.999},
        {"files": HASHES | {DRIFT: "f" * 64}},
    ],
    ids=" ".join,
)
def test_manifest_at_its_limits_is_accepted(fields: dict[str, Any]) -> None:
    assert isinstance(parsed(**fields), Manifest)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (wide(0), "backbone.n_features: .* greater than 0"),
        (wide(1_000_001), "backbone.n_features: .* less than or equal to 1000000"),
        ({"backbone__input_size": [0, 8]}, "backbone.input_size.0: .* greater than 0"),
        ({"backbone__parity": -1e-9}, "backbone.parity: .* greater than or equal to 0"),
        ({"backbone__cosine": 1.0011}, "backbone.cosine: .* less than or equal to 1.001"),
        ({"backbone__offset": float("inf")}, "backbone.offset: Input should be a finite number"),
        ({"golden_tolerance": 0.0501}, "golden_tolerance: .* less than or equal to 0.05"),
        ({"golden_tolerance": 0}, "golden_tolerance: .* greater than 0"),
        ({"training_data__rows": -1}, "training_data.rows: .* greater than or equal to 0"),
        ({"training_data__holdout_rows": -1}, "training_data.holdout_rows: .* greater than or equal to 0"),
        ({"training_data__holdout_share": 0}, "training_data.holdout_share: .* greater than 0"),
        ({"training_data__holdout_share": 1}, "training_data.holdout_share: .* less than 1"),
        ({"training_data__group_by": "g" * 1_001}, "training_data.group_by: .* at most 1000 characters"),
        ({"training_data__fingerprint": "0" * 63}, "training_data.fingerprint: String should match"),
        ({"training_data__fingerprint": "0" * 63 + "G"}, "training_data.fingerprint: String should match"),
        ({"files": HASHES | {GOLDEN: "0" * 65}}, r"files\.golden\.npz: String should match"),
        ({"classes": ["a"], "classifier__n_out": 1}, "classes: .* at least 2 items"),
        ({"classes": ["a", "b"], "classifier__n_out": 2, "threshold": 0}, "threshold: .* greater than 0"),
        ({"classes": ["a", "b"], "classifier__n_out": 2, "threshold": 1}, "threshold: .* less than 1"),
        ({"threshold": 0.5}, "a threshold requires two classes, there are 3"),
        ({"classes": ["a", "b", "a"]}, "class names are not unique"),
        ({"projection__n_in": 5}, "projection.n_in is 5, but backbone.n_features is 4"),
        ({"projection__n_in": 3}, "projection.n_in is 3, but backbone.n_features is 4"),
        ({"classifier__n_in": 3}, "classifier.n_in is 3, but projection.n_out is 2"),
        ({"classifier__n_out": 2}, "classifier.n_out is 2, but the number of classes is 3"),
        ({"files": {}}, "should list the files"),
        ({"files": HASHES | {"more.npz": "0" * 64}}, "should list the files"),
        ({"files": dict.fromkeys(FILES - {GOLDEN}, "0" * 64)}, "should list the files"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(value),
)
def test_manifest_beyond_its_limits_is_rejected(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(ModelError, match=rf"^(manifest\.json: )?.*{reason}"):
        parsed(**fields)


def test_missing_fields_of_an_older_manifest_have_their_original_defaults() -> None:
    older = parsed()
    assert older.schema_version == 1
    assert older.golden_tolerance == 1e-3
    assert (older.threshold, older.fit, older.training_data.holdout) == (None, {}, {})
    assert older.training_data.seed == 42
    backbone = older.backbone
    assert (backbone.engine, backbone.resize, backbone.output, backbone.precision) == (
        "litert",
        "stretch",
        "pooled",
        "float32",
    )
    assert (backbone.channel_order, backbone.channel_means, backbone.cosine) == ("rgb", (0.0, 0.0, 0.0), 1.0)


def test_parsed_manifest_is_immutable() -> None:
    manifest = parsed()
    for entry, field in ((manifest, "classes"), (manifest.backbone, "scale"), (manifest.classifier, "n_out")):
        with pytest.raises(ValueError, match="frozen"):
            setattr(entry, field, getattr(entry, field))


def test_stage_with_unknown_fields_is_rejected() -> None:
    for entry, values in (
        (StageEntry, {"kind": "pca", "n_in": 4, "n_out": 2}),
        (TrainingData, {"rows": 1, "holdout_rows": 0, "fingerprint": "0" * 64}),
    ):
        entry(**values)
        with pytest.raises(ValueError, match="Extra inputs are not permitted"):
            entry(**values, more=1)


# Backbones


def exported(precision: Any = "float32") -> ExportedBackbone:
    spec = BACKBONES["mobilenet_v2"]
    return ExportedBackbone(spec, "imagenet", Path("f"), Path("w"), "0" * 64, 0.25, precision, 0.5)


def test_backbone_entry_records_the_export() -> None:
    entry = BackboneEntry.of(exported("int8"), "crop")
    spec = exported().spec
    assert (entry.name, entry.weights, entry.engine, entry.resize) == (spec.name, "imagenet", "litert", "crop")
    assert (entry.input_size, entry.output, entry.n_features) == (spec.input_size, spec.output, spec.n_features)
    assert (entry.precision, entry.parity, entry.cosine) == ("int8", 0.25, 0.5)
    assert (entry.scale, entry.offset) == (spec.preprocessing.scale, spec.preprocessing.offset)
    assert BackboneEntry.of(exported()).resize == "stretch"


def test_keras_engine_with_int8_is_rejected() -> None:
    assert BackboneEntry.of(exported(), engine="keras").engine == "keras"
    with pytest.raises(ModelError, match="keras computes in float32; int8 requires the engine litert"):
        BackboneEntry.of(exported("int8"), engine="keras")


# Imported networks


def network(format_: Any = "onnx") -> Network:
    recipe = Recipe(input_size=(8, 8), channels="bgr")
    return Network(format=format_, source="net", source_sha256="1" * 64, tensor="features", recipe=recipe)


def imported(**fields: Any) -> BackboneEntry:
    values = tiny_manifest().backbone.model_dump() | {"engine": "onnx", "network": network()} | fields
    return BackboneEntry(**values)


@pytest.mark.parametrize(("engine", "format_"), [("onnx", "onnx"), ("litert", "tflite")])
def test_imported_network_replaces_the_files_and_the_preprocessing(engine: str, format_: str) -> None:
    entry = imported(engine=engine, network=network(format_))
    assert entry.scored_file == f"backbone.{format_}"
    assert entry.files == {entry.scored_file}
    assert entry.fitting == network().recipe
    built_in = tiny_manifest().backbone
    assert (built_in.fitting, built_in.scored_file, built_in.files) == ("stretch", FLATBUFFER_FILE, FILES - HEAD_FILES)


def test_features_of_an_imported_network_are_identified_by_file_recipe_and_output() -> None:
    entry = imported(output="flat")
    hashes = dict.fromkeys(HEAD_FILES, "0" * 64) | {"backbone.onnx": "2" * 64}
    assert tiny_manifest(backbone=entry, files=hashes).backbone_sha256 == network().identity("2" * 64, "flat")
    built_in = HASHES | {FLATBUFFER_FILE: "3" * 64}
    assert tiny_manifest(files=built_in).backbone_sha256 == "3" * 64


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"network": None}, "the engine onnx does not run this network"),
        ({"engine": "litert"}, "the engine litert does not run this network"),
        ({"network": network("tflite")}, "the engine onnx does not run this network"),
        (
            {"engine": "keras", "network": network("tflite")},
            "the imported network and its recipe do not match the entry",
        ),
        ({"input_size": (8, 9)}, "the imported network and its recipe do not match the entry"),
    ],
)
def test_imported_network_that_does_not_match_its_entry_is_rejected(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        imported(**fields)


# Reading


@pytest.mark.parametrize(("engine", "other"), [("litert", WEIGHTS_FILE), ("keras", FLATBUFFER_FILE)])
def test_file_that_the_engine_does_not_use_is_verified_and_not_kept(tmp_path: Path, engine: Any, other: str) -> None:
    backbone = tiny_manifest().backbone.model_copy(update={"engine": engine})
    directory = tiny_bundle(tmp_path / "bundle", backbone=backbone)
    bundle = read_bundle(directory)
    assert set(bundle.files) == FILES - {other}
    assert backbone.scored_file in bundle.files
    for name, content in bundle.files.items():
        assert content == (directory / name).read_bytes()
    replace_file(directory, other, b"altered")
    with pytest.raises(ModelError, match=f"{other} has SHA-256"):
        read_bundle(directory)


def test_drift_reference_is_read_with_the_bundle(tmp_path: Path) -> None:
    directory = tiny_bundle(tmp_path / "bundle", drift=True)
    bundle = read_bundle(directory)
    assert bundle.manifest.files == {name: file_sha256(directory / name) for name in (*FILES, DRIFT)}
    np.testing.assert_array_equal(bundle.arrays(DRIFT)["values"], [0, 1, 2, 3, 4])


def test_unlisted_drift_reference_is_rejected(tmp_path: Path) -> None:
    directory = tiny_bundle(tmp_path / "bundle")
    (directory / DRIFT).write_bytes((directory / GOLDEN).read_bytes())
    with pytest.raises(ModelError, match=f"found .*{re.escape(DRIFT)}"):
        read_bundle(directory)


def test_manifest_is_readable_and_deterministic(tmp_path: Path) -> None:
    first, second = (tiny_bundle(tmp_path / name, classes=("ä", "b", "c")) / MANIFEST for name in ("one", "two"))
    text = first.read_text(encoding="utf-8")
    assert text == second.read_text(encoding="utf-8")
    assert "ä" in text
    assert text.endswith("}\n")
    assert list(json.loads(text)) == sorted(json.loads(text))
    assert "\n  " in text
    assert "threshold" not in json.loads(text)


def test_inconsistent_bundle_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="classifier.n_out is 3, but the number of classes is 2"):
        tiny_bundle(tmp_path / "bundle", classes=("a", "b"))
    assert not (tmp_path / "bundle" / MANIFEST).exists()


def test_manifest_limit_is_16_mebibytes(tmp_path: Path) -> None:
    directory = tiny_bundle(tmp_path / "bundle")
    text = (directory / MANIFEST).read_bytes()
    replace_file(directory, MANIFEST, text + b" " * (16 * 1024**2 - len(text)))
    assert read_bundle(directory).manifest == parse_manifest(text)
    replace_file(directory, MANIFEST, text + b" " * (16 * 1024**2 + 1 - len(text)))
    with pytest.raises(ModelError, match=r"manifest\.json has 16,777,217 bytes, more than the 16,777,216 allowed"):
        read_bundle(directory)


@pytest.mark.parametrize("name", sorted(FILES))
def test_file_at_the_size_limit_is_read_and_one_byte_more_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    directory = tiny_bundle(tmp_path / "bundle")
    replace_file(directory, name, bytes(1000))
    seal(directory)
    monkeypatch.setattr(bundle_module, "MAX_FILE_BYTES", 1000)
    read_bundle(directory)
    monkeypatch.setattr(bundle_module, "MAX_FILE_BYTES", 999)
    with pytest.raises(ModelError, match=f"{name} has 1,000 bytes, more than the 999 allowed"):
        read_bundle(directory)


def test_file_limit_is_2_gibibytes(tmp_path: Path) -> None:
    directory = tiny_bundle(tmp_path / "bundle")
    with (directory / GOLDEN).open("wb") as file:
        file.truncate(2 * 1024**3 + 1)
    with pytest.raises(ModelError, match="2,147,483,649 bytes, more than the 2,147,483,648 allowed"):
        read_bundle(directory)


def test_unreadable_bundle_is_named(tmp_path: Path) -> None:
    directory = tmp_path / ("long" * 100)
    for read in (read_bundle, lambda path: read_manifest(BundleFolder(path))):
        with pytest.raises(ModelError, match=r"bundle .*longlong.* cannot be read: .*too long"):
            read(directory)
