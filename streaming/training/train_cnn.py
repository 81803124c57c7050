"""Trains a CNN on Spark's workers and registers it as a model version: a backbone, and a head on its features."""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Literal

from pyspark.sql import DataFrame
from pyspark.sql import functions as F  # noqa: N812  as Spark's own documentation writes it

from models.backbone import ExportedBackbone, export_backbone, find_backbone
from models.bundle import Bundle, TrainingData, read_bundle
from models.evaluation import Evaluation
from models.objective import resolve_objective
from models.projection import NoProjection
from models.scorer import Head
from models.threshold_aim import ThresholdAim, parse_threshold
from streaming.distributed.checkpoint import read_checkpoint
from streaming.distributed.history import EpochRecord, History
from streaming.distributed.network import quiet_tensorflow
from streaming.distributed.options import TrainerOptions
from streaming.distributed.shards import identified
from streaming.distributed.trainer import DistributedTrainer, Trained
from streaming.distributed.training_run import WorkerProgress
from streaming.errors import UsageError
from streaming.images.dataset import Dataset
from streaming.images.groups import chosen_groups
from streaming.images.images_frame import images_frame
from streaming.images.labels import given_labels, image_labels
from streaming.images.split import Sides, check_sides
from streaming.pipeline.preflight import with_fixed_heap
from streaming.platform.java import find_java
from streaming.platform.session import spark_session
from streaming.registry import open_registry
from streaming.settings import Settings
from streaming.storage.home import make_dir
from streaming.training.candidate import BackboneParts, judge, write_model
from streaming.training.choose_threshold import aim_for, tuned_threshold
from streaming.training.evaluate import evaluate
from streaming.training.fit import Fitted, fingerprint_of
from streaming.training.fit_options import GateOptions
from streaming.training.inherit import objective_for
from streaming.training.job import Job, OnStep, TrainResult, champion_of, sample_images
from streaming.training.tracking import check_tracking
from streaming.wording import counted

if TYPE_CHECKING:
    import keras

Schedule = Literal["constant", "cosine", "plateau"]
SESSION = {
    "spark.python.daemon.module": "streaming.distributed.daemon",
    # Every step allocates arrays of the same sizes: let malloc reuse them.
    "spark.executorEnv.MALLOC_MMAP_THRESHOLD_": str(32 * 1024**2),
    "spark.executorEnv.MALLOC_TRIM_THRESHOLD_": str(256 * 1024**2),
    "spark.stage.maxConsecutiveAttempts": "8",  # a failure restarts all workers of a synchronous training
}
FEW_SHUFFLES = {"spark.sql.shuffle.partitions": "8"}  # only file names are shuffled


@dataclass(frozen=True)
class CNNOptions:
    """The network and the split of a training.

    Attributes:
        architecture: `cnn_gray`, `cnn_color`, or the name of a backbone, which gets a new head.
        weights: initial weights: `random`, `imagenet`, or a file.
        input_size: side of the input in pixels; None for the network's own.
        unfreeze: number of a pretrained backbone's last blocks that are trained besides the head; -1 for all.
        holdout: fraction of the images held out for evaluation.
        validation: fraction of the remaining images used for validation.
        schedule: learning-rate schedule: `cosine` decays to 0, `plateau` halves the rate if the validation loss has not
            decreased for three epochs.
        patience: number of epochs without a lower validation loss after which training stops and restores the best
            weights.
        threshold: see `FitOptions`; selected on the validation images.
        metric: see `FitOptions`.
        group_by: see `FitOptions`.
    """

    architecture: str = "cnn_gray"
    weights: str = "random"
    input_size: int | None = None
    unfreeze: int = 0
    holdout: float = 0.2
    validation: float = 0.1
    schedule: Schedule = "constant"
    patience: int | None = None
    threshold: str | None = None
    metric: str | None = None
    group_by: str | None = None

    def __post_init__(self) -> None:
        if self.threshold is not None:
            parse_threshold(self.threshold)
        resolve_objective(self.metric, self.threshold)
        for name in ("holdout", "validation"):
            if not 0 < getattr(self, name) < 1:
                raise UsageError(f"{name} should be between 0 and 1, got {getattr(self, name)}")
        if self.patience is not None and self.patience < 1:
            raise UsageError(f"patience should be 1 or more epochs, got {self.patience}")

    @property
    def size(self) -> tuple[int, int] | None:
        return None if self.input_size is None else (self.input_size, self.input_size)


@dataclass(frozen=True)
class CNNResult:
    """The result of a training.

    Attributes:
        model: the registered version, evaluated on the held-out images.
        training: evaluation on the training images.
        at_half: evaluation on the held-out images without a threshold.
        bad: image → why it could not be read, for the first ones.
        n_bad: number of images that could not be read.
        history_file: file with `history` as JSON.
    """

    model: TrainResult
    training: Evaluation
    at_half: Evaluation
    history: History
    bad: dict[str, str]
    n_bad: int
    history_file: Path


def train_cnn(
    settings: Settings,
    dataset: Dataset,
    network: CNNOptions,
    options: TrainerOptions,
    gate: GateOptions,
    *,
    resume: bool = False,
    on_step: OnStep = lambda _: None,
    on_epoch: Callable[[EpochRecord], None] = lambda _: None,
    on_progress: Callable[[WorkerProgress], None] = lambda _: None,
) -> CNNResult:
    """Train, export, evaluate and register a CNN; it becomes the champion if it is the first model or passes the gate.

    Args:
        network: the network and the split.
        resume: continue an interrupted training after its last complete epoch.
        on_progress: called with the progress of a worker.

    Raises:
        ServiceError: see `DistributedTrainer.fit`; or there is no checkpoint to resume.
        ModelError: the architecture is unknown or the weights are not available.
    """
    check_tracking(settings.mlflow_tracking_uri)
    make_dir(settings.work_dir)
    settings.place.check()
    find_java(settings.work_dir)
    spec = find_backbone(network.architecture, input_size=network.size)
    aim = None if network.threshold is None else aim_for(network.threshold, len(dataset.class_counts))
    registry = open_registry(settings.home)
    champion = champion_of(registry)
    objective = objective_for(network.metric, network.threshold, champion)
    network = replace(network, metric=str(objective))
    golden = sample_images(dataset, spec.input_size)
    directory = settings.work_dir / "train-cnn"
    if resume:
        read_checkpoint(directory)  # fail before the slow start
    slots, java_options = with_fixed_heap(_with_slots(settings, options.workers))
    group_by = chosen_groups(network.group_by, champion)
    sides = Sides.of(network.holdout, network.validation, options.seed, group_by)
    conf = SESSION | (FEW_SHUFFLES if dataset.kind == "files" else {})
    with spark_session(slots, "imagestream train-cnn", java_options=java_options, conf=conf) as spark:
        job = Job(
            settings, spark, registry, champion, gate, on_step, "train-cnn", group_by=group_by, objective=objective
        )
        on_step(f"dividing {counted(dataset.n_images, 'image')}")
        images = identified(images_frame(spark, dataset, lambda n, _: min(n, options.workers)))
        if dataset.kind == "files":  # small rows of names, computed from all files
            images = images.persist()
        labels = labels_of(images, given_labels(spark, job.features), group_by).persist()
        warnings = check_sides(labels, sides.holdout)
        n_classes = sides.training(labels)[0].select("label").distinct().count()
        if network.threshold is not None:  # corrected labels may have changed the classes
            aim = aim_for(network.threshold, n_classes)
        on_step(f"building {network.architecture}")
        model = _build(network, options, n_classes)
        trainer = DistributedTrainer(
            model,
            options,
            callbacks=_callbacks(network, options),
            checkpoint_dir=directory,
            limits=settings.image_limits,
            on_epoch=on_epoch,
            on_progress=on_progress,
        )
        on_step(f"training on {counted(options.workers, 'worker')}")
        labelled = images.drop("label").join(labels, ["image_id", "source"])
        to_train = sides.holdout.sides(labelled)[0].withColumn("validation", sides.validation.held_out())
        trained = trainer.fit(to_train, resume=resume)
        on_step("exporting the network")
        exported, head = export_trained(network.architecture, network.size, trained, settings.backbones_dir)
        rows, read = job.featurized(dataset, exported)
        head = _with_threshold(head, sides.training(rows)[1], aim)
        fitted = Fitted(head, *fingerprint_of(sides.holdout.sides(rows)[0]))
        record = _record(network, options, trained.history)
        candidate = judge(fitted, sides.holdout, rows, record, warnings=warnings)
        exact = head.threshold is None
        at_half = candidate.evaluation if exact else evaluate(candidate.holdout, replace(head, threshold=None))
        on_training = evaluate(candidate.training, head)
        result = job.finish(candidate, rows, BackboneParts.of(exported, golden), exported.sha256, read)
    path = directory / "history.json"
    path.write_text(json.dumps(trained.history.as_record(), indent=1) + "\n", encoding="utf-8")
    return CNNResult(result, on_training, at_half, trained.history, trained.bad, trained.n_bad, path)


def _with_slots(settings: Settings, workers: int) -> Settings:
    """Return settings with at least one local slot per worker: synchronous workers must run at the same time."""
    match = re.fullmatch(r"local(?:\[([^\],]+)(,[0-9]+)?\])?", settings.master.replace(" ", ""))
    if match is None or (match[1] and match[1].isdigit() and int(match[1]) >= workers):
        return settings
    return settings.model_copy(update={"master": f"local[{workers}{match[2] or ',4'}]"})


def labels_of(images: DataFrame, given: DataFrame | None, group_by: str | None) -> DataFrame:
    """Return each image of a data set once with its label; see `streaming.images.labels`.

    Args:
        images: columns image_id, source, label.
        given: the result of `given_labels`.

    Returns:
        Columns image_id, source, label and, with `group_by`, group_id.
    """
    at = F.timestamp_seconds(F.lit(0)).alias("at")
    no_key = F.lit(None).cast("binary").alias("key")
    claims = images.select("image_id", F.col("image_id").alias("known_as"), "label", at, "source", no_key)
    labels = image_labels(claims, given, group_by)
    return labels.where(F.col("label").isNotNull()).drop("known_as", "contradictory")


def _build(network: CNNOptions, options: TrainerOptions, n_classes: int) -> "keras.Model":
    quiet_tensorflow()
    from models.cnn import build_network

    return build_network(
        network.architecture,
        n_classes,
        weights=network.weights,
        input_size=network.size,
        seed=options.seed,
        unfreeze=network.unfreeze,
    )


def _callbacks(network: CNNOptions, options: TrainerOptions) -> Sequence["keras.callbacks.Callback"]:
    import keras

    callbacks: list[keras.callbacks.Callback] = []
    if network.schedule == "cosine":
        schedule = keras.optimizers.schedules.CosineDecay(options.learning_rate, options.epochs)
        callbacks.append(keras.callbacks.LearningRateScheduler(lambda epoch: float(schedule(epoch))))
    if network.schedule == "plateau":
        callbacks.append(keras.callbacks.ReduceLROnPlateau(factor=0.5, patience=3))
    if network.patience is not None:
        callbacks.append(keras.callbacks.EarlyStopping(patience=network.patience, restore_best_weights=True))
    return callbacks


def export_trained(
    architecture: str, input_size: tuple[int, int] | None, trained: Trained, cache_dir: Path
) -> tuple[ExportedBackbone, Head]:
    """Split a trained network into its backbone, exported to LiteRT and verified against Keras, and its head.

    Args:
        input_size: height and width in pixels; None for the network's own.
    """
    from models.cnn import head_of, save_body

    with TemporaryDirectory(prefix="imagestream-") as scratch:
        weights = Path(scratch) / "body.weights.h5"
        save_body(trained.model, weights)
        exported = export_backbone(architecture, str(weights), cache_dir, input_size=input_size)
    head = Head(trained.classes, NoProjection(exported.spec.n_features), head_of(trained.model))
    return replace(exported, weights="trained"), head


def _with_threshold(head: Head, validation: DataFrame, aim: ThresholdAim | None) -> Head:
    if aim is None:
        return head
    return replace(head, threshold=aim.fixed if aim.fixed is not None else tuned_threshold(validation, head, aim))


def as_bundle(
    architecture: str, input_size: tuple[int, int] | None, trained: Trained, golden: Sequence[bytes], scratch: Path
) -> Bundle:
    """Return a trained network as a bundle in memory, without a registry.

    Args:
        input_size: height and width in pixels; None for the network's own.
        golden: images for the golden predictions.
        scratch: folder for the export and the bundle's files.
    """
    exported, head = export_trained(architecture, input_size, trained, scratch / "backbones")
    n = sum(one.training.rows for one in trained.history.epochs[-1].workers) if trained.history.epochs else 0
    fingerprint = hashlib.sha256(exported.sha256.encode()).hexdigest()
    data = TrainingData(rows=n, holdout_rows=0, fingerprint=fingerprint)
    write_model(scratch / "bundle", Fitted(head, n, fingerprint), BackboneParts.of(exported, golden), data)
    return read_bundle(scratch / "bundle")


def _record(network: CNNOptions, options: TrainerOptions, history: History) -> dict[str, str | int | float]:
    """Return the settings for the manifest."""
    given = asdict(options) | {
        "epochs": len(history.epochs),
        "schedule": network.schedule,
        "unfreeze": network.unfreeze,
        "holdout": network.holdout,
        "threshold": network.threshold,
        "metric": network.metric,
    }
    return {name: value for name, value in given.items() if isinstance(value, str | int | float)}
