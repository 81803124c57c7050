"""A candidate for the champion's place: fitted and evaluated on stored features, compared, written as a bundle."""

import math
import shutil
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
from models.objective import ACCURACY, Objective
from models.paired import PairedCounts
from models.scorer import Scorer, golden_arrays, load_engine, load_head
from streaming.errors import DataError
from streaming.images.exposure import salt_of
from streaming.images.fitted_on import gather, unseen_by
from streaming.images.split import Split, check_sides
from streaming.registry import Registry
from streaming.training.choose_threshold import with_threshold
from streaming.training.evaluate import Evaluation, evaluate
from streaming.training.fit import Fitted, fit
from streaming.training.fit_options import FitOptions
from streaming.training.gate import Paired, pair
from streaming.training.reference import drift_reference

LIBRARIES = ("ai-edge-litert", "keras", "numpy", "onnxruntime", "pyspark", "scipy", "tensorflow")
METRIC_DIGITS = 9  # sums of floats may differ in their last bits with the order of the rows


@dataclass(frozen=True)
class BackboneParts:
    """What a new bundle takes over as it is: the backbone, and images to make golden predictions of."""

    entry: BackboneEntry
    files: Mapping[str, Path]
    golden: Sequence[bytes]

    @classmethod
    def of(cls, exported: ExportedBackbone, golden: Sequence[bytes], engine: EngineName = "litert") -> Self:
        """An export, to be run by `engine`."""
        files = {FLATBUFFER_FILE: exported.flatbuffer, WEIGHTS_FILE: exported.keras_weights}
        return cls(BackboneEntry.of(exported, engine=engine), files, golden)


@dataclass(frozen=True)
class Candidate:
    """A fitted model, and how it does on the images that were held out."""

    fitted: Fitted
    evaluation: Evaluation
    split: Split
    record: Mapping[str, str | int | float]  # the settings that it was fitted with
    training: DataFrame  # image_id, known_as, label, features, group_id if grouped; without altered copies
    holdout: DataFrame  # likewise
    backbone: BloomFilter | None = None  # what its backbone was trained on, if another version brought it
    warnings: Sequence[str] = ()  # what to know of how the classes are divided

    def metrics(self) -> dict[str, float]:
        """The finite ones of its figures."""
        found = self.evaluation.as_metrics()
        return {name: round(value, METRIC_DIGITS) for name, value in found.items() if math.isfinite(value)}


@dataclass(frozen=True)
class Comparison:
    """The champion beside a candidate, on images that neither was fitted on."""

    paired: Paired
    champion: Evaluation

    @property
    def counts(self) -> PairedCounts:
        return self.paired.counts


def make_candidate(rows: DataFrame, options: FitOptions, backbone: BloomFilter | None = None) -> Candidate:
    """Split, fit and evaluate.

    Args:
        rows: image_id, known_as, label, features, group_id where the options group images, and augmentation where there
            are altered copies, on which is fitted but not evaluated; persisted, and in the order of
            `streaming.training.fit.in_order`.
        backbone: the images that the backbone was trained on, if it was in this home: they judge nobody.

    Raises:
        ServiceError: fewer than two classes, or nothing to hold out.
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
    """Evaluate what was fitted on one side of a split by the other.

    Args:
        images: image_id, known_as, label, features, of both sides, and group_id where the split groups images.
        record: the settings that it was fitted with.
        backbone: as for `make_candidate`.
        warnings: of the split.

    Raises:
        ServiceError: nothing is held out, or the backbone was trained on all of it.
    """
    training, holdout = split.sides(images)
    if backbone is not None:
        holdout = unseen_by(holdout, FittedOn(backbone))
    evaluation = evaluate(holdout, fitted.head)
    if not evaluation.rows:
        raise DataError(
            "no image is left to judge by: "
            + ("none fell into the holdout" if backbone is None else "the backbone was trained on all that is held out")
            + "; add images, or give another --holdout or --seed"
        )
    return Candidate(fitted, evaluation, split, record, training, holdout, backbone, warnings)


def compare(
    candidate: Candidate,
    champion: Bundle,
    champion_rows: DataFrame,
    seen: FittedOn,
    objective: Objective = ACCURACY,
) -> Comparison:
    """The answers of both to the candidate's holdout, without images that the champion was fitted on.

    Args:
        champion_rows: image_id, known_as, label, features, of the champion's backbone, and group_id if grouped.
        seen: what the champion was fitted on.
    """
    head = load_head(champion)
    ids = candidate.holdout.select("image_id")
    unseen = unseen_by(champion_rows.join(ids, "image_id", "left_semi"), seen)
    unseen = unseen.select("image_id", "label", "features").persist()
    try:
        paired = pair(candidate.fitted.head, candidate.holdout, head, unseen, objective)
        return Comparison(paired, evaluate(unseen, head))
    finally:
        unseen.unpersist()


def register(
    registry: Registry, candidate: Candidate, parts: BackboneParts, more: Mapping[str, float]
) -> tuple[int, str]:
    """Make the candidate a version of the registry, or find the version that is the same to the last bit.

    Args:
        more: figures to keep in the manifest beside the candidate's own.

    Returns:
        (version, SHA-256 of the bundle).
    """
    with TemporaryDirectory(prefix="imagestream-") as scratch:
        written = Path(scratch) / "bundle"
        sha256 = _write(written, candidate, parts, more)
        version = registry.find(sha256)
        if version is None:
            version = registry.register(lambda directory: shutil.move(written, directory))
        return version, sha256


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
    """Write a fitted model as a bundle into `directory`, which must not exist; returns its SHA-256."""
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
    drift = drift_reference(candidate.holdout, fitted.head)
    metrics = {**candidate.metrics(), **more}
    return write_model(directory, fitted, parts, data, metrics=metrics, record=candidate.record, drift=drift, seen=seen)
