"""Candidates for the champion: fitted and evaluated on stored features, compared, and written as bundles."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version as installed_version
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Self

from pyspark.sql import DataFrame

from models.backbone import FLATBUFFER_FILE, WEIGHTS_FILE, ExportedBackbone
from models.bloom_filter import BloomFilter, FittedOn
from models.bundle import (
    CLASSIFIER,
    DRIFT,
    FITTED_ON,
    GOLDEN,
    PROJECTION,
    BackboneEntry,
    Bundle,
    EngineName,
    Manifest,
    StageEntry,
    TrainingData,
    write_bundle,
)
from models.drift import DriftReference
from models.evaluation import Evaluation
from models.objective import ACCURACY, Objective
from models.paired import PairedCounts
from models.scorer import Scorer, golden_arrays, load_engine, load_head
from streaming.errors import DataError
from streaming.images.membership import salt_of
from streaming.images.membership_spark import gather, unseen_by
from streaming.images.split import Split, check_sides
from streaming.registry import Registry
from streaming.training.choose_threshold import with_threshold
from streaming.training.drift_reference import drift_reference
from streaming.training.evaluate import evaluate
from streaming.training.fit import Fitted, fit
from streaming.training.fit_options import FitOptions
from streaming.training.gate import Paired, pair

LIBRARIES = ("ai-edge-litert", "keras", "numpy", "onnxruntime", "pyspark", "scipy", "tensorflow")
METRIC_DIGITS = 9  # the last bits of floating-point sums may depend on the order of the rows


@dataclass(frozen=True)
class BackboneParts:
    """The backbone of a new bundle, and the images for its golden predictions."""

    entry: BackboneEntry
    files: Mapping[str, Path]
    golden: Sequence[bytes]

    @classmethod
    def of(cls, exported: ExportedBackbone, golden: Sequence[bytes], engine: EngineName = "litert") -> Self:
        """Return the parts of an exported backbone that `engine` runs.

        Args:
            golden: images for the golden predictions.
            engine: engine that runs the backbone in the stream.
        """
        files = {FLATBUFFER_FILE: exported.flatbuffer, WEIGHTS_FILE: exported.keras_weights}
        return cls(BackboneEntry.of(exported, engine=engine), files, golden)


@dataclass(frozen=True)
class Candidate:
    """A fitted model and its evaluation on held-out images."""

    fitted: Fitted
    evaluation: Evaluation
    split: Split
    record: Mapping[str, str | int | float]  # settings for the manifest
    training: DataFrame  # image_id, known_as, label, features, group_id if grouped; without augmented copies
    holdout: DataFrame  # the same columns
    backbone: BloomFilter | None = None  # training images of its backbone, if an earlier version trained it
    warnings: Sequence[str] = ()  # about the classes on each side of the split

    def metrics(self) -> dict[str, float]:
        """Return the finite metrics."""
        found = self.evaluation.as_metrics()
        return {name: round(value, METRIC_DIGITS) for name, value in found.items() if math.isfinite(value)}


@dataclass(frozen=True)
class ChampionComparison:
    """A comparison of a candidate with the champion on images on which neither was fitted."""

    paired: Paired
    champion: Evaluation

    @property
    def counts(self) -> PairedCounts:
        return self.paired.counts


def make_candidate(rows: DataFrame, options: FitOptions, backbone: BloomFilter | None = None) -> Candidate:
    """Split, fit and evaluate.

    Args:
        rows: columns image_id, known_as, label, features, group_id if grouped, and augmentation with augmented copies,
            which are used for fitting only; persisted and in the order of `streaming.training.fit.in_order`.
        backbone: images on which the backbone was trained, which are excluded from the evaluation.

    Raises:
        ServiceError: there are fewer than two classes or no held-out images.
    """
    images = rows.where("augmentation IS NULL") if "augmentation" in rows.columns else rows
    split = Split(options.seed, options.holdout, options.group_by)
    warnings = check_sides(images, split)
    training = split.sides(rows)[0]
    fitted = with_threshold(fit(training, options), training, options)
    copies = {"augmented": 1} if "augmentation" in rows.columns else {}
    return judge(fitted, split, images, options.as_record() | copies, backbone, warnings)


def judge(
    fitted: Fitted,
    split: Split,
    images: DataFrame,
    record: Mapping[str, str | int | float],
    backbone: BloomFilter | None = None,
    warnings: Sequence[str] = (),
) -> Candidate:
    """Evaluate a fitted model on the held-out side of a split.

    Args:
        images: columns image_id, known_as, label, features and, if grouped, group_id, of both sides.
        record: settings for the manifest.
        backbone: images on which the backbone was trained, which are excluded from the evaluation.

    Raises:
        ServiceError: there are no held-out images, or the backbone was trained on all of them.
    """
    training, holdout = split.sides(images)
    if backbone is not None:
        holdout = unseen_by(holdout, FittedOn(backbone))
    evaluation = evaluate(holdout, fitted.head)
    if not evaluation.rows:
        raise DataError(
            "no image is left for the evaluation: "
            + ("none is held out" if backbone is None else "the backbone was trained on all held-out images")
            + "; add images, or give another --holdout or --seed"
        )
    return Candidate(fitted, evaluation, split, record, training, holdout, backbone, warnings)


def compare(
    candidate: Candidate, champion: Bundle, champion_rows: DataFrame, seen: FittedOn, objective: Objective = ACCURACY
) -> ChampionComparison:
    """Compare both on the candidate's held-out images, without those on which the champion was fitted.

    Args:
        champion_rows: columns image_id, known_as, label, features of the champion's backbone, group_id if grouped.
        seen: images on which the champion was fitted.
    """
    head = load_head(champion)
    ids = candidate.holdout.select("image_id")
    unseen = unseen_by(champion_rows.join(ids, "image_id", "left_semi"), seen)
    unseen = unseen.select("image_id", "label", "features").persist()
    try:
        paired = pair(candidate.fitted.head, candidate.holdout, head, unseen, objective)
        return ChampionComparison(paired, evaluate(unseen, head))
    finally:
        unseen.unpersist()


def register(
    registry: Registry, candidate: Candidate, parts: BackboneParts, more: Mapping[str, float]
) -> tuple[int, str]:
    """Register the candidate, or find the version with the identical bundle; return the version and its SHA-256.

    Args:
        more: further metrics for the manifest.
    """
    with TemporaryDirectory(prefix="imagestream-") as scratch:
        written = Path(scratch) / "bundle"
        sha256 = _write(written, candidate, parts, more)
        return registry.keep(written, sha256)[0], sha256


def write_model(
    directory: Path,
    fitted: Fitted,
    parts: BackboneParts,
    data: TrainingData,
    *,
    metrics: Mapping[str, float] = MappingProxyType({}),
    record: Mapping[str, str | int | float] = MappingProxyType({}),
    drift: DriftReference | None = None,
    seen: FittedOn | None = None,
) -> str:
    """Write a fitted model as a bundle and return its SHA-256.

    Args:
        directory: the folder to write, which must not exist.
        parts: the backbone and golden images.
        data: facts about the training data.
        record: settings for the manifest.
        seen: images on which the model was fitted.
    """
    head, entry = fitted.head, parts.entry
    projection, classifier = head.projection, head.classifier
    manifest = Manifest(
        backbone=entry,
        projection=StageEntry(kind=projection.kind, n_in=projection.n_in, n_out=projection.n_out),
        classifier=StageEntry(kind=classifier.kind, n_in=classifier.n_in, n_out=classifier.n_classes),
        classes=head.classes,
        threshold=head.threshold,
        metrics={name: round(value, METRIC_DIGITS) for name, value in metrics.items()},
        training_data=data,
        fit=dict(record),
        libraries={name: installed_version(name) for name in LIBRARIES},
    )
    scorer = Scorer(load_engine(entry, parts.files[entry.scored_file].read_bytes()), head, entry.fitting)
    arrays = {
        PROJECTION: projection.to_arrays(),
        CLASSIFIER: classifier.to_arrays(),
        GOLDEN: golden_arrays(scorer, parts.golden),
    }
    if drift is not None:
        arrays[DRIFT] = drift.to_arrays()
    if seen is not None:
        arrays[FITTED_ON] = seen.to_arrays()
    return write_bundle(directory, manifest, parts.files, arrays)


def _write(directory: Path, candidate: Candidate, parts: BackboneParts, more: Mapping[str, float]) -> str:
    fitted = candidate.fitted
    data = TrainingData(
        rows=fitted.rows,
        holdout_rows=candidate.evaluation.rows,
        fingerprint=fitted.fingerprint,
        seed=candidate.split.seed,
        holdout_share=candidate.split.share,
        group_by=candidate.split.group_by,
    )
    seen = FittedOn(gather(candidate.training, salt_of(fitted.fingerprint)), candidate.backbone)
    drift = drift_reference(candidate.holdout, fitted.head, candidate.evaluation.rows)
    metrics = {**candidate.metrics(), **more}
    return write_model(directory, fitted, parts, data, metrics=metrics, record=candidate.record, drift=drift, seen=seen)
