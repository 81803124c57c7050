"""Small real model versions: the default backbone with a head fitted by scikit-learn on a few digits."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
from sklearn.linear_model import LogisticRegression as ReferenceRegression

from models.arrays import Features
from models.backbone import FLATBUFFER_FILE, WEIGHTS_FILE, ExportedBackbone
from models.bloom_filter import BloomFilter, FittedOn
from models.bundle import (
    CLASSIFIER,
    FITTED_ON,
    GOLDEN,
    PROJECTION,
    BackboneEntry,
    Manifest,
    StageEntry,
    TrainingData,
    write_bundle,
)
from models.classifier import LogisticRegression
from models.engine import LiteRTEngine
from models.projection import GramSums, fit_pca
from models.scorer import Head, Scorer, decode_all, golden_arrays
from streaming.images.dataset import digit_images
from streaming.registry import Registry
from streaming.storage.registry_objects import FOLDER, version_key

TRAINING_DATA = TrainingData(rows=100, holdout_rows=0, fingerprint="0" * 64)


@dataclass(frozen=True)
class Digits:
    """Real images, their labels, and their features (N, 1280) from the default backbone."""

    images: list[bytes]
    labels: list[str]
    features: Features


def some_digits(exported: ExportedBackbone, count: int) -> Digits:
    _, labels, images = zip(*digit_images(count), strict=True)
    engine = LiteRTEngine(exported.flatbuffer, threads=2)
    return Digits(list(images), list(labels), engine(decode_all(images, engine.input_size).images))


def fit_head(features: Features, labels: Sequence[str], k: int = 8) -> Head:
    """Fit a PCA with `k` components and a logistic regression."""
    sums = GramSums(features.shape[1])
    sums.add(features)
    pca = fit_pca(sums, k=k)
    fitted = ReferenceRegression(max_iter=1000).fit(pca.transform(features).astype(np.float64), list(labels))
    return Head(tuple(map(str, fitted.classes_)), pca, LogisticRegression(fitted.coef_, fitted.intercept_))


def seen_images(images: Sequence[bytes]) -> FittedOn:
    """The record of a model that was fitted on these images."""
    found = BloomFilter.empty(len(images), 614)
    found.add([sha256(image).hexdigest().encode() for image in images])
    return FittedOn(found)


def register_model(
    registry: Registry,
    exported: ExportedBackbone,
    head: Head,
    images: Sequence[bytes],
    training_data: TrainingData = TRAINING_DATA,
    seen: FittedOn | None = None,
) -> int:
    """Register a version with this head; `images` become its golden images."""
    spec, projection, classifier = exported.spec, head.projection, head.classifier
    manifest = Manifest(
        backbone=BackboneEntry.of(exported),
        projection=StageEntry(kind=projection.kind, n_in=spec.n_features, n_out=projection.n_out),
        classifier=StageEntry(kind=classifier.kind, n_in=projection.n_out, n_out=len(head.classes)),
        classes=head.classes,
        threshold=head.threshold,
        metrics={"accuracy": 0.9},
        training_data=training_data,
        libraries={},
    )
    arrays = {
        PROJECTION: projection.to_arrays(),
        CLASSIFIER: classifier.to_arrays(),
        GOLDEN: golden_arrays(Scorer(LiteRTEngine(exported.flatbuffer), head), images),
    }
    if seen is not None:
        arrays[FITTED_ON] = seen.to_arrays()
    files = {FLATBUFFER_FILE: exported.flatbuffer, WEIGHTS_FILE: exported.keras_weights}
    return registry.register(lambda directory: write_bundle(directory, manifest, files, arrays))


def bundle_folder(home: Path, version: int) -> Path:
    """The directory of a registered version's files."""
    path: str = json.loads((home / version_key(version)).read_bytes())["path"]
    return home / FOLDER / path
