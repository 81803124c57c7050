"""Training and retraining: two batch jobs over the same fit, beside the stream and never inside it.

`train` featurizes labelled files into the table `features` and fits on them. `retrain` fits on all that the table
holds: the first training set, and what the stream has stored with the labels that came with the messages. Both hold
out the same images, so a candidate and the champion are compared on rows that neither was fitted on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version as installed_version
from pathlib import Path

from pyspark.sql import DataFrame

from models.backbone import FLATBUFFER_FILE, WEIGHTS_FILE, export_backbone, find_backbone
from models.bundle import (
    CLASSIFIER,
    GOLDEN,
    PROJECTION,
    BackboneEntry,
    Bundle,
    Manifest,
    StageEntry,
    TrainingData,
    write_bundle,
)
from models.decode import BadImage, decode
from models.engine import LiteRTEngine
from models.projection import check_pca_memory
from models.registry import CHAMPION, Registry
from models.scorer import Scorer, golden_arrays, golden_images, load_head
from streaming.dataset import LabelledFile
from streaming.errors import ServiceError
from streaming.evaluate import Evaluation, evaluate
from streaming.featurize import featurize
from streaming.fit import FitOptions, Fitted, fit, variance_kept
from streaming.home import make_dir
from streaming.java import find_java
from streaming.labels import labelled_features
from streaming.session import spark_session
from streaming.settings import Settings
from streaming.split import Split, plan_split
from streaming.tables import Table

GOLDEN_IMAGES = 4
LIBRARIES = ("ai-edge-litert", "keras", "numpy", "pyspark", "tensorflow")


@dataclass(frozen=True)
class BackboneParts:
    """What a new bundle takes over as it is: the backbone, and images to make golden predictions of."""

    entry: BackboneEntry
    files: Mapping[str, Path]
    golden: Sequence[bytes]


@dataclass(frozen=True)
class TrainResult:
    """A registered model version and what was found about it."""

    version: int
    promoted: bool
    why: str
    evaluation: Evaluation
    champion: Evaluation | None  # the champion on the same holdout, where there was one
    training_rows: int
    n_components: int
    variance_kept: float | None
    bad: dict[str, str]


def train(
    settings: Settings,
    files: Sequence[LabelledFile],
    backbone: str,
    weights: str,
    options: FitOptions,
    by: str = "train",
) -> TrainResult:
    """Featurize files, fit, evaluate, register; the champion when it is the first, else by the gate of `retrain`.

    Raises:
        ServiceError: no image decodes, or fewer than two classes.
        ModelError: an unknown backbone, or weights that cannot be had.
    """
    make_dir(settings.home)
    find_java(settings.home)  # before the minute that an export can take
    check_pca_memory(find_backbone(backbone).n_features)
    exported = export_backbone(backbone, weights, settings.backbones_dir)
    features = Table(settings.tables_dir, "features")
    registry = Registry(settings.models_dir)
    parts = BackboneParts(
        BackboneEntry.of(exported),
        files={FLATBUFFER_FILE: exported.flatbuffer, WEIGHTS_FILE: exported.keras_weights},
        golden=_some_images([Path(file.path) for file in files], exported.spec.input_size),
    )
    with spark_session(settings, "imagestream train") as spark:
        featurized = featurize(spark, files, exported, features)
        if not featurized.rows:
            path, why = next(iter(featurized.bad.items()))
            raise ServiceError(f"not one of the {len(files)} files is an image that decodes; the first: {path}: {why}")
        rows = labelled_features(spark, features, exported.sha256)
        return _fit_and_register(rows, registry, parts, options, by, featurized.bad)


def retrain(settings: Settings, options: FitOptions, by: str = "retrain") -> TrainResult:
    """Fit a new version on all labelled features there are, with the champion's backbone; promote it by the gate.

    Raises:
        ServiceError: there is no champion, or no labelled features.
    """
    registry = Registry(settings.models_dir)
    current = registry.target(CHAMPION)
    if current is None:
        raise ServiceError(f"there is no champion model in {registry.root} to retrain; run 'imagestream train' first")
    champion = registry.read(current)
    features = Table(settings.tables_dir, "features")
    parts = BackboneParts(
        champion.manifest.backbone,
        files={name: registry.path(current) / name for name in (FLATBUFFER_FILE, WEIGHTS_FILE)},
        golden=golden_images(champion.arrays(GOLDEN)),
    )
    with spark_session(settings, "imagestream retrain") as spark:
        rows = labelled_features(spark, features, champion.backbone_sha256)
        return _fit_and_register(rows, registry, parts, options, by, {})


def _fit_and_register(
    rows: DataFrame,
    registry: Registry,
    parts: BackboneParts,
    options: FitOptions,
    by: str,
    bad: dict[str, str],
) -> TrainResult:
    rows = rows.persist()
    try:
        current = registry.target(CHAMPION)
        champion_bundle = registry.read(current) if current else None
        held_out = _split(rows, options, champion_bundle)
        training, holdout = held_out.sides(rows)
        fitted = fit(training, options)
        evaluation = evaluate(holdout, fitted.head)
        if not evaluation.rows:
            raise ServiceError(f"no image fell into the holdout of {options.holdout:.0%}; train on more images")
        champion = _evaluate_bundle(champion_bundle, parts.entry, holdout) if champion_bundle else None
    finally:
        rows.unpersist()
    version = registry.register(lambda directory: _write(directory, fitted, evaluation, held_out, parts))
    promote, why = decide(evaluation, champion)
    if promote:
        registry.promote(version, by=by, why=why, metrics=evaluation.as_metrics())
    return TrainResult(
        version=version,
        promoted=promote,
        why=why,
        evaluation=evaluation,
        champion=champion,
        training_rows=fitted.rows,
        n_components=fitted.head.projection.n_out,
        variance_kept=variance_kept(fitted.head.projection),
        bad=bad,
    )


def decide(candidate: Evaluation, champion: Evaluation | None) -> tuple[bool, str]:
    """The gate: (promote?, why). A candidate must be at least as accurate as the champion on the same holdout."""
    if champion is None:
        return True, "the first model"
    figures = f"accuracy {candidate.accuracy:.4f} against {champion.accuracy:.4f} on the same {candidate.rows} images"
    return candidate.accuracy >= champion.accuracy, figures


def _split(rows: DataFrame, options: FitOptions, champion: Bundle | None) -> Split:
    """The champion's split where the seed is the same, extended by classes it did not know; else one of its own."""
    of_champion = champion.manifest.training_data if champion else None
    kept = of_champion.holdout if of_champion and of_champion.seed == options.seed else None
    return plan_split(rows, options.holdout, options.seed, kept)


def _evaluate_bundle(bundle: Bundle, entry: BackboneEntry, holdout: DataFrame) -> Evaluation | None:
    """A registered model on the holdout; None if its features are not those that the holdout holds."""
    if bundle.manifest.backbone != entry:
        return None
    return evaluate(holdout, load_head(bundle))


def _some_images(paths: Sequence[Path], size: tuple[int, int]) -> list[bytes]:
    """A few images that decode, spread over the files, to keep in the bundle as golden ones."""
    step = max(1, len(paths) // GOLDEN_IMAGES)
    images: list[bytes] = []
    for path in [*paths[::step], *paths]:
        if len(images) == GOLDEN_IMAGES:
            break
        if path.is_file():
            data = path.read_bytes()
            if data not in images and not isinstance(decode(data, size), BadImage):
                images.append(data)
    return images


def _write(directory: Path, fitted: Fitted, evaluation: Evaluation, held_out: Split, parts: BackboneParts) -> None:
    projection, classifier = fitted.head.projection, fitted.head.classifier
    manifest = Manifest(
        backbone=parts.entry,
        projection=StageEntry(kind=projection.kind, n_in=projection.n_in, n_out=projection.n_out),
        classifier=StageEntry(kind=classifier.kind, n_in=classifier.n_in, n_out=classifier.n_classes),
        classes=fitted.head.classes,
        metrics=evaluation.as_metrics(),
        training_data=TrainingData(
            rows=fitted.rows,
            holdout_rows=evaluation.rows,
            fingerprint=fitted.fingerprint,
            seed=held_out.seed,
            holdout=dict(held_out.thresholds),
        ),
        libraries={name: installed_version(name) for name in LIBRARIES},
    )
    scorer = Scorer(LiteRTEngine(parts.files[FLATBUFFER_FILE]), fitted.head, parts.entry.resize)
    arrays = {
        PROJECTION: projection.to_arrays(),
        CLASSIFIER: classifier.to_arrays(),
        GOLDEN: golden_arrays(scorer, parts.golden),
    }
    write_bundle(directory, manifest, parts.files, arrays)
