from pathlib import Path

import numpy as np
import pytest
from samples import Digits, copy_bundle
from sklearn.linear_model import LogisticRegression as ReferenceRegression

from models.backbone import FLATBUFFER_FILE, WEIGHTS_FILE, ExportedBackbone
from models.bundle import (
    CLASSIFIER,
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

DIGITS = 150  # fewer than the number of features, as in many a first training run


@pytest.fixture(scope="session")
def digits(exported: ExportedBackbone) -> Digits:
    _, labels, images = zip(*digit_images(DIGITS), strict=True)
    engine = LiteRTEngine(exported.flatbuffer, threads=2)
    return Digits(list(images), list(labels), engine(decode_all(images, engine.input_size).images))


@pytest.fixture(scope="session")
def head(digits: Digits) -> Head:
    """A PCA and a logistic regression fitted on the digits."""
    sums = GramSums(digits.features.shape[1])
    sums.add(digits.features)
    pca = fit_pca(sums, 0.9)
    fitted = ReferenceRegression(max_iter=1000).fit(pca.transform(digits.features).astype(np.float64), digits.labels)
    return Head(tuple(fitted.classes_), pca, LogisticRegression(fitted.coef_, fitted.intercept_))


@pytest.fixture(scope="session")
def scorer(exported: ExportedBackbone, head: Head) -> Scorer:
    return Scorer(LiteRTEngine(exported.flatbuffer), head)


@pytest.fixture(scope="session")
def manifest(exported: ExportedBackbone, head: Head) -> Manifest:
    """The manifest of a bundle with `head`; it does not list the files yet."""
    spec, n_features, k = exported.spec, exported.spec.n_features, head.projection.n_out
    return Manifest(
        backbone=BackboneEntry(
            name=spec.name,
            weights=exported.weights,
            input_size=spec.input_size,
            scale=spec.preprocessing.scale,
            offset=spec.preprocessing.offset,
            n_features=n_features,
            parity=exported.parity,
        ),
        projection=StageEntry(kind="pca", n_in=n_features, n_out=k),
        classifier=StageEntry(kind="logistic_regression", n_in=k, n_out=len(head.classes)),
        classes=head.classes,
        metrics={"accuracy": 0.9},
        training_data=TrainingData(rows=DIGITS, holdout_rows=0, fingerprint="0" * 64),
        libraries={},
    )


@pytest.fixture(scope="session")
def bundle_dir(
    exported: ExportedBackbone,
    scorer: Scorer,
    manifest: Manifest,
    digits: Digits,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A complete bundle; tests modify a copy of it, see `bundle_copy`."""
    directory = tmp_path_factory.mktemp("bundle") / "whole"
    backbone_files = {FLATBUFFER_FILE: exported.flatbuffer, WEIGHTS_FILE: exported.keras_weights}
    arrays = {
        PROJECTION: scorer.head.projection.to_arrays(),
        CLASSIFIER: scorer.head.classifier.to_arrays(),
        GOLDEN: golden_arrays(scorer, digits.images[:3]),
    }
    write_bundle(directory, manifest, backbone_files, arrays)
    return directory


@pytest.fixture
def bundle_copy(bundle_dir: Path, tmp_path: Path) -> Path:
    return copy_bundle(bundle_dir, tmp_path / "bundle")
