"""How much faster is rescoring history from stored features than running the CNN again?"""

import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

import numpy as np
import pyarrow as pa

from benchmarks.pairs import Pair
from models.arrays import Features
from models.backbone import DEFAULT_BACKBONE, FLATBUFFER_FILE, WEIGHTS_FILE, ExportedBackbone, export_backbone
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
from streaming.jobs.rescore import rescore
from streaming.registry import open_registry
from streaming.settings import Settings
from streaming.storage.files import FileSink, list_array
from streaming.storage.tables import FEATURES, Table

ROWS, FILES, IMAGES = 100_000, 50, 400
ROWS_AT_ONCE = 64  # as in the stream
RUNS = 3


def questions() -> Iterator[Pair]:
    with TemporaryDirectory() as scratch:
        exported = export_backbone(DEFAULT_BACKBONE, "imagenet", Path(scratch) / "backbones")
        _, labels, images = zip(*digit_images(IMAGES), strict=True)
        engine = LiteRTEngine(exported.flatbuffer, threads=os.cpu_count() or 1)

        def run_cnn() -> Features:
            return engine(decode_all(images, engine.input_size).images)

        features = run_cnn()
        ours, peer = [], []
        for run in range(RUNS):
            settings = Settings(home=Path(scratch) / str(run))
            _register(settings, exported, _head(features, np.array(labels)), images[:2])
            _store(settings, exported.sha256, features)
            clock = perf_counter()
            rows = rescore(settings, 1).rows
            ours.append(rows / (perf_counter() - clock))
            clock = perf_counter()
            run_cnn()
            peer.append(IMAGES / (perf_counter() - clock))
        question = (
            f"rescore {ROWS:,} × {features.shape[1]:,} stored features, against decoding and the CNN on all cores"
        )
        yield Pair(question, "rows/s", 200.0, ours, peer)


def _head(features: Features, labels: np.ndarray) -> Head:
    """PCA and a logistic regression of the class means: only the shape matters, not the predictions."""
    sums = GramSums(features.shape[1])
    sums.add(features)
    pca = fit_pca(sums, 0.9)
    projected = pca.transform(features).astype(np.float64)
    classes = sorted(set(labels))
    means = np.stack([projected[labels == one].mean(axis=0) for one in classes])
    return Head(tuple(classes), pca, LogisticRegression(means, -(means**2).sum(axis=1) / 2))


def _register(settings: Settings, exported: ExportedBackbone, head: Head, images: tuple[bytes, ...]) -> None:
    spec, projection = exported.spec, head.projection
    manifest = Manifest(
        backbone=BackboneEntry.of(exported),
        projection=StageEntry(kind=projection.kind, n_in=spec.n_features, n_out=projection.n_out),
        classifier=StageEntry(kind=head.classifier.kind, n_in=projection.n_out, n_out=len(head.classes)),
        classes=head.classes,
        metrics={},
        training_data=TrainingData(rows=IMAGES, holdout_rows=0, fingerprint="0" * 64),
        libraries={},
    )
    arrays = {
        PROJECTION: projection.to_arrays(),
        CLASSIFIER: head.classifier.to_arrays(),
        GOLDEN: golden_arrays(Scorer(LiteRTEngine(exported.flatbuffer), head), images),
    }
    files = {FLATBUFFER_FILE: exported.flatbuffer, WEIGHTS_FILE: exported.keras_weights}
    open_registry(settings.home).register(lambda directory: write_bundle(directory, manifest, files, arrays))


def _store(settings: Settings, backbone_sha256: str, features: Features) -> None:
    """Write `ROWS` rows of the table `features`, copies of real ones, in files as the stream writes them."""
    table = Table(settings.place.tables, "features")
    files = []
    for number in range(FILES):
        with FileSink(table.place, FEATURES) as sink:
            for first in range(number * ROWS // FILES, (number + 1) * ROWS // FILES, ROWS_AT_ONCE):
                offsets = np.arange(first, min(first + ROWS_AT_ONCE, (number + 1) * ROWS // FILES))
                given = {
                    "image_id": pa.array([f"{offset:064x}" for offset in offsets]),
                    "topic": pa.repeat("images", len(offsets)),
                    "partition": pa.repeat(pa.scalar(0, pa.int32()), len(offsets)),
                    "offset": pa.array(offsets),
                    "backbone_sha256": pa.repeat(backbone_sha256, len(offsets)),
                    "features": list_array(features[offsets % len(features)]),
                }
                columns = [given.get(field.name, pa.nulls(len(offsets), field.type)) for field in FEATURES]
                sink.write(pa.table(columns, schema=FEATURES))
            written = sink.close()
            if written:
                files.append(written)
    table.append_files(files, "benchmark", 0)
