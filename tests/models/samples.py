"""Digits, bundles and manifests that tests share."""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from models.arrays import Arrays, Features
from models.backbone import FLATBUFFER_FILE, WEIGHTS_FILE
from models.bundle import (
    CLASSIFIER,
    DRIFT,
    GOLDEN,
    MANIFEST,
    PROJECTION,
    BackboneEntry,
    Manifest,
    StageEntry,
    TrainingData,
    write_bundle,
)


@dataclass(frozen=True)
class Digits:
    """Encoded images, their labels, and their features (N, 1280) from the default backbone."""

    images: list[bytes]
    labels: list[str]
    features: Features


def copy_bundle(source: Path, target: Path) -> Path:
    """Copy a bundle that a test modifies. Its files are hard links: replace a file, never write to it."""
    return shutil.copytree(source, target, copy_function=os.link)


def replace_file(bundle: Path, name: str, content: bytes) -> None:
    """Replace a file, which may be a hard link to the original bundle's file."""
    (bundle / name).unlink(missing_ok=True)
    (bundle / name).write_bytes(content)


def seal(bundle: Path, **fields: Any) -> None:
    """Update a modified bundle's hashes, and set manifest fields (`stage__field` for a field of a stage)."""
    content = json.loads((bundle / MANIFEST).read_bytes())
    for name, value in fields.items():
        *stage, field = name.split("__")
        (content[stage[0]] if stage else content)[field] = value
    for name in content["files"]:
        content["files"][name] = hashlib.sha256((bundle / name).read_bytes()).hexdigest()
    replace_file(bundle, MANIFEST, json.dumps(content).encode())


def tiny_manifest(**fields: Any) -> Manifest:
    """A consistent manifest: 4 features, 2 components and 3 classes."""
    backbone = BackboneEntry(name="b", weights="random", input_size=(8, 8), scale=1, offset=0, n_features=4, parity=0)
    whole: dict[str, Any] = {
        "backbone": backbone,
        "projection": StageEntry(kind="pca", n_in=4, n_out=2),
        "classifier": StageEntry(kind="logistic_regression", n_in=2, n_out=3),
        "classes": ("a", "b", "c"),
        "metrics": {"accuracy": 0.9},
        "training_data": TrainingData(rows=10, holdout_rows=2, fingerprint="0" * 64),
        "libraries": {},
    }
    return Manifest(**whole | fields)


def tiny_bundle(directory: Path, *, drift: bool = False, **fields: Any) -> Path:
    """A bundle that `read_bundle` accepts; its backbone files contain a few bytes and no network."""
    sources = directory.parent / f"{directory.name}-sources"
    sources.mkdir(parents=True)
    backbone = {name: sources / name for name in (FLATBUFFER_FILE, WEIGHTS_FILE)}
    for name, path in backbone.items():
        path.write_text(f"the content of {name}")
    names = (PROJECTION, CLASSIFIER, GOLDEN, *([DRIFT] if drift else []))
    arrays: dict[str, Arrays] = {name: {"values": np.arange(number + 2)} for number, name in enumerate(names)}
    write_bundle(directory, tiny_manifest(**fields), backbone, arrays)
    return directory
