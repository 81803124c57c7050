"""Training and retraining: batch jobs that run alongside the stream.

`train` featurizes labelled images into the table `features` and fits on them. `retrain` fits on all labelled features
in the table: the first training set and the features stored by the stream, with labels from the messages or added
later. Both hold out the same images, so a candidate and the champion are compared on images on which neither was
fitted, and the gate (`streaming.training.gate`) decides.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from models.backbone import find_backbone
from models.bundle import GOLDEN
from models.projection import check_pca_memory
from models.scorer import golden_images
from streaming.errors import NotFoundError
from streaming.images.dataset import Dataset
from streaming.images.groups import chosen_groups
from streaming.images.membership import backbone_fitted_on
from streaming.platform.java import find_java
from streaming.platform.session import spark_session
from streaming.registry import CHAMPION, open_registry
from streaming.settings import Settings
from streaming.storage.home import make_dir
from streaming.training.backbones import BackboneOptions, make_backbone
from streaming.training.calibrate import calibration_images
from streaming.training.candidate import BackboneParts, make_candidate
from streaming.training.fit import MEMORY_FOR_FITTING
from streaming.training.fit_options import FitOptions, GateOptions
from streaming.training.inherit import objective_for, options_like
from streaming.training.job import Job, OnStep, TrainResult, champion_of, sample_images
from streaming.training.tracking import check_tracking


def train(
    settings: Settings,
    dataset: Dataset,
    backbone: BackboneOptions,
    options: FitOptions,
    gate: GateOptions,
    *,
    augment: int = 0,
    on_step: OnStep = lambda _: None,
    by: str = "train",
) -> TrainResult:
    """Featurize images, fit, evaluate and register; the model becomes the champion if it is the first or passes the
    gate.

    Args:
        augment: number of augmented copies of each training image.
        on_step: called with a description of each step.
        by: name recorded in the alias's history.

    Raises:
        ServiceError: no image can be decoded, or there are fewer than two classes.
        ModelError: the backbone is unknown or its weights are not available.
    """
    check_tracking(settings.mlflow_tracking_uri)
    make_dir(settings.work_dir)
    settings.place.check()
    find_java(settings.work_dir)  # fail before the slow export
    with TemporaryDirectory(prefix="imagestream-") as scratch:
        if not backbone.is_file:  # fail before the slow export
            _check_memory(options, find_backbone(backbone.name, backbone.output, backbone.size).n_features)
        made = make_backbone(backbone, settings.backbones_dir, Path(scratch), on_step)
        entry = made.source.entry
        _check_memory(options, entry.n_features)
        registry = open_registry(settings.home)
        champion = champion_of(registry)
        objective = objective_for(options.metric, options.threshold, champion)
        options = replace(options, metric=str(objective), group_by=chosen_groups(options.group_by, champion))
        golden = sample_images(dataset, entry.input_size)
        with spark_session(settings, "imagestream train", conf=MEMORY_FOR_FITTING) as spark:
            job = Job(settings, spark, registry, champion, gate, on_step, by, augment, options.group_by, objective)
            rows, read = job.featurized(dataset, made.source, find_duplicates=not backbone.int8)
            exact = None
            if backbone.int8:
                exact = make_candidate(rows, options)
                pixels = calibration_images(dataset, exact.split, rows, entry.input_size)
                made = make_backbone(backbone, settings.backbones_dir, Path(scratch), on_step, pixels)
                rows.unpersist()
                rows, read = job.featurized(dataset, made.source)
            on_step("fitting and evaluating")
            candidate = make_candidate(rows, options)
            parts = replace(made.parts, golden=golden)
            result = job.finish(candidate, rows, parts, made.source.sha256, read, exact=exact)
    return replace(result, warnings=[*made.guessed, *result.warnings])


def _check_memory(options: FitOptions, n_features: int) -> None:
    if options.projection == "pca":
        check_pca_memory(n_features)


def retrain(
    settings: Settings,
    given: Mapping[str, Any],
    gate: GateOptions,
    *,
    dry_run: bool = False,
    augmented: bool | None = None,
    on_step: OnStep = lambda _: None,
    by: str = "retrain",
) -> TrainResult:
    """Fit a new version on all labelled features of the champion's backbone and promote it if it passes the gate.

    No image is read and no feature recomputed.

    Args:
        given: names and values of `FitOptions` that override the champion's; None for those that do not.
        dry_run: neither register nor promote.
        augmented: whether to fit on stored augmented copies, too; None for the champion's setting.
        by: name recorded in the alias's history.

    Raises:
        ServiceError: there is no champion or there are no labelled features.
    """
    check_tracking(settings.mlflow_tracking_uri)
    if not dry_run:
        settings.place.check()
    registry = open_registry(settings.home)
    current = registry.target(CHAMPION)
    if current is None:
        raise NotFoundError(f"there is no champion model in {registry.place} to retrain; run 'imagestream train' first")
    with TemporaryDirectory(prefix="imagestream-") as scratch:
        folder = Path(scratch) / "champion"
        champion = registry.fetch(current, folder)
        options, inherited = options_like(champion.manifest, given)
        objective = objective_for(options.metric, options.threshold, champion)
        options = replace(options, metric=str(objective), group_by=chosen_groups(options.group_by, champion))
        if augmented is None:
            augmented = bool(champion.manifest.fit.get("augmented"))
        parts = BackboneParts(
            champion.manifest.backbone,
            files={name: folder / name for name in champion.manifest.backbone.files},
            golden=golden_images(champion.arrays(GOLDEN)),
        )
        with spark_session(settings, "imagestream retrain", conf=MEMORY_FOR_FITTING) as spark:
            shared = (settings, spark, registry, champion, gate, on_step, by, int(augmented))
            job = Job(*shared, group_by=options.group_by, objective=objective, inherited=inherited)
            rows = job.stored(champion.backbone_sha256, parts.entry.n_features)
            on_step("fitting and evaluating")
            candidate = make_candidate(rows, options, backbone_fitted_on(registry, champion, settings.place))
            return job.finish(candidate, rows, parts, champion.backbone_sha256, None, dry_run=dry_run)
