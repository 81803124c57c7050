"""Training on Spark's workers in every mode, and failures during training."""

import os
import shutil
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pytest
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F  # noqa: N812

from models.cnn import build_network
from models.decode import decode
from streaming.distributed.checkpoint import FILE, read_checkpoint
from streaming.distributed.history import EpochRecord
from streaming.distributed.options import Frequency, Mode, TrainerOptions
from streaming.distributed.shards import shard
from streaming.distributed.trainer import DistributedTrainer, Trained
from streaming.errors import ServiceError

if TYPE_CHECKING:
    import keras

pytestmark = pytest.mark.usefixtures("workers_with_tensorflow")

SIDE = 32
OPTIONS = TrainerOptions(workers=2, batch_size=32, epochs=3, learning_rate=2e-3, seed=7)
ALONE = replace(OPTIONS, workers=1)  # where several workers are not the point
PER_BATCH = replace(OPTIONS, epochs=2, frequency=Frequency.BATCH, augment=True)
MODES = [pytest.param(mode, frequency, id=f"{mode}-{frequency}") for mode in Mode for frequency in Frequency]


def network(seed: int = 7) -> "keras.Model":
    return build_network("cnn_gray", 2, input_size=(SIDE, SIDE), seed=seed)


def train(rows: DataFrame, options: TrainerOptions, *, resume: bool = False, **given: Any) -> Trained:
    return DistributedTrainer(network(), options, **given).fit(rows, resume=resume)


def learned(trained: Trained) -> np.ndarray:
    return np.concatenate([values.ravel() for values in trained.model.get_weights()])


@pytest.mark.parametrize(("mode", "frequency"), MODES)
def test_every_mode_finishes_and_learns(rows: DataFrame, mode: Mode, frequency: Frequency) -> None:
    history = train(rows, replace(OPTIONS, mode=mode, frequency=frequency, epochs=4)).history
    assert (history.mode, history.frequency, history.workers) == (mode, frequency, 2)
    assert [one.epoch for one in history.epochs] == [0, 1, 2, 3]
    assert {one.training.rows for one in history.epochs} == {270}
    assert {one.validation.rows for one in history.epochs} == {30}
    assert {worker.training.rows for one in history.epochs for worker in one.workers} == {135}
    last = history.epochs[-1]
    assert last.validation.accuracy >= 0.9
    assert last.validation.log_loss < history.epochs[0].training.log_loss
    assert last.validation.clipped_loss / last.validation.rows == pytest.approx(last.validation.log_loss, abs=1e-4)
    assert history.bytes_moved > 0
    pushes = 0 if mode is Mode.SYNCHRONOUS else 2 * 4 * (9 if frequency is Frequency.BATCH else 1)
    assert sum(history.staleness.values()) == pushes
    if mode is not Mode.HOGWILD:
        assert history.lost.values == 0
    assert not history.events


def test_shards_depend_on_content_not_on_location(rows: DataFrame) -> None:
    elsewhere = rows.withColumn("source", F.concat(F.lit("/another/folder/"), F.reverse("source")))

    def dealt(images: DataFrame) -> list[set[str]]:
        of = shard(images, 3, seed=5).withColumn("worker", F.spark_partition_id()).collect()
        return [{row.image_id for row in of if row.worker == worker} for worker in range(3)]

    assert dealt(elsewhere) == dealt(rows)
    assert [len(of) for of in dealt(rows)] == [100, 100, 100]


def test_synchronous_batches_equal_single_process_training(rows: DataFrame) -> None:
    import keras

    options = replace(OPTIONS, frequency=Frequency.BATCH, epochs=2, optimizer="adam")
    ours = train(rows, options)
    alone = network()
    alone.compile(keras.optimizers.Adam(options.learning_rate), keras.losses.BinaryCrossentropy(from_logits=True))
    shards = shard(rows, 2, options.seed).withColumn("worker", F.spark_partition_id()).where("NOT validation").collect()
    images, labels = [], []
    for worker in (0, 1):
        own = [row for row in shards if row.worker == worker]
        images.append(np.stack([decode(Path(row.source).read_bytes(), (SIDE, SIDE)) for row in own]))
        labels.append(np.array([int(row.label) for row in own]))
    for epoch in range(options.epochs):
        orders = [np.random.default_rng([7, worker, epoch]).permutation(len(labels[worker])) for worker in (0, 1)]
        for start in range(0, max(map(len, orders)), 16):
            picked = [order[start : start + 16] for order in orders]
            batch = np.concatenate([images[worker][picked[worker]] for worker in (0, 1)])
            truth = np.concatenate([labels[worker][picked[worker]] for worker in (0, 1)])
            alone.train_on_batch(batch, truth[:, None])
    theirs = np.concatenate([values.ravel() for values in alone.get_weights()])
    moved = np.abs(theirs - np.concatenate([values.ravel() for values in network().get_weights()])).max()
    assert moved > 0.01
    assert np.abs(learned(ours) - theirs).max() < 1e-4


@pytest.fixture(scope="module")
def first_epoch(rows: DataFrame, tmp_path_factory: pytest.TempPathFactory) -> tuple[Trained, Path]:
    """The first of two epochs, on the rows in another order, and the folder of its checkpoint."""
    checkpoints = tmp_path_factory.mktemp("checkpoints")
    return train(rows.repartition(3), replace(PER_BATCH, epochs=1), checkpoint_dir=checkpoints), checkpoints


def test_synchronous_training_is_deterministic_and_resumes_identically(
    rows: DataFrame, first_epoch: tuple[Trained, Path], tmp_path: Path
) -> None:
    """For epoch-wise training with callbacks, see test_resume.py."""
    whole = train(rows, PER_BATCH)
    checkpoints = shutil.copytree(first_epoch[1], tmp_path / "checkpoints")
    assert read_checkpoint(checkpoints).state.epoch == 1
    resumed = train(rows.repartition(3), PER_BATCH, checkpoint_dir=checkpoints, resume=True)
    assert (learned(resumed) == learned(whole)).all()
    assert [one.epoch for one in resumed.history.epochs] == [0, 1]


@pytest.mark.parametrize(
    "mode", [Mode.SYNCHRONOUS, Mode.ASYNCHRONOUS, pytest.param(Mode.HOGWILD, marks=pytest.mark.full_only)]
)
def test_killed_worker_costs_at_most_one_epoch(rows: DataFrame, mode: Mode) -> None:
    killed: list[int] = []

    def kill_once(record: EpochRecord) -> None:
        if not killed:
            killed.append(record.epoch)
            # A synchronous failure restarts all. An asynchronous worker that is far ahead may have finished.
            for worker in record.workers[:1] if mode is Mode.SYNCHRONOUS else record.workers:
                with suppress(ProcessLookupError):
                    os.kill(int(worker.process.rpartition(":")[2]), signal.SIGKILL)

    history = train(rows, replace(OPTIONS, mode=mode, epochs=4), on_epoch=kill_once).history
    assert killed == [0]
    assert 1 <= len(history.events) <= 2
    assert [one.epoch for one in history.epochs] == [0, 1, 2, 3]
    assert {one.training.rows for one in history.epochs} == {270}
    assert history.epochs[-1].validation.accuracy >= 0.9


def test_worker_without_images_does_not_block_the_others(spark: SparkSession, rows: DataFrame) -> None:
    good = [row.asDict() for row in rows.where("NOT validation").limit(1).collect()]
    common = {"label": "other", "validation": False, "content": b"not an image"}
    bad = [{"source": name, "image_id": name} | common for name in ("bad 0", "bad 1")]
    images = spark.createDataFrame(pa.Table.from_pylist(good + bad))
    trained = train(images, replace(OPTIONS, frequency=Frequency.BATCH, epochs=2))
    assert [one.training.rows for one in trained.history.epochs] == [1, 1]
    assert sorted(worker.training.rows for worker in trained.history.epochs[0].workers) == [0, 1]
    assert trained.n_bad == 2
    assert trained.bad["bad 1"].startswith("not_an_image")


def test_keras_callbacks_are_passed_through(rows: DataFrame) -> None:
    import keras

    rates: list[float] = []

    class Rates(keras.callbacks.Callback):
        def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
            rates.append(float(self.model.optimizer.learning_rate))
            assert logs is not None
            assert set(logs) >= {"loss", "accuracy", "val_loss", "val_accuracy"}

    callbacks = [
        keras.callbacks.LearningRateScheduler(lambda epoch: 0.002 if epoch == 0 else 0.5),  # undoes what was learned
        keras.callbacks.EarlyStopping(patience=2, restore_best_weights=True),
        Rates(),
    ]
    trained = train(rows, replace(ALONE, epochs=9), callbacks=callbacks)
    history = trained.history
    assert rates == pytest.approx([0.002, 0.5, 0.5][: len(rates)])
    assert history.stopped_early
    assert len(history.epochs) == 3
    assert [one.learning_rate for one in history.epochs] == pytest.approx(rates)
    assert history.epochs[0].validation.log_loss < history.epochs[-1].validation.log_loss
    assert np.abs(learned(trained)).max() < 5  # the weights of the first epoch


def test_class_weights_shift_the_predictions(rows: DataFrame, first_epoch: tuple[Trained, Path]) -> None:
    plain, _ = first_epoch
    weighted = train(rows, replace(PER_BATCH, workers=1, epochs=1, class_weights={"1": 50.0}))
    images = np.zeros((1, SIDE, SIDE, 3), np.uint8)
    assert weighted.model(images)[0, 0] > plain.model(images)[0, 0]


def test_non_finite_weights_end_the_training(rows: DataFrame) -> None:
    with pytest.raises(ServiceError, match="has diverged"):
        train(rows, replace(ALONE, optimizer="sgd", learning_rate=1e30))


def test_invalid_training_is_rejected(rows: DataFrame, tmp_path: Path) -> None:
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: train(rows.where("label = '0'"), OPTIONS), "at least two classes"),
        (lambda: DistributedTrainer(build_network("cnn_gray", 3), OPTIONS).fit(rows), "outputs 3 logits"),
        (lambda: train(rows, replace(OPTIONS, class_weights={"7": 2.0})), "unknown classes: 7"),
        (lambda: train(rows, replace(OPTIONS, optimizer="nope")), "unknown optimizer 'nope'"),
        (lambda: train(rows, replace(OPTIONS, workers=5)), "need as many slots, Spark has 2"),
        (lambda: train(rows, OPTIONS, checkpoint_dir=tmp_path, resume=True), "no training to resume"),
        (lambda: TrainerOptions(mode="sideways"), "mode should be one of synchronous"),
        (lambda: TrainerOptions(workers=0), "workers should be at least 1"),
    ]
    for run, why in cases:
        with pytest.raises(ServiceError, match=why):
            run()
    with pytest.raises(TypeError):
        TrainerOptions(sideways=True)  # type: ignore[call-arg]


def test_checkpoint_of_another_training_is_not_resumed(
    rows: DataFrame, first_epoch: tuple[Trained, Path], tmp_path: Path
) -> None:
    checkpoints = shutil.copytree(first_epoch[1], tmp_path / "checkpoints")
    with pytest.raises(ServiceError, match="another seed"):
        train(rows, replace(PER_BATCH, seed=8), checkpoint_dir=checkpoints, resume=True)
    (checkpoints / FILE).write_bytes(b"PK\x03\x04 damaged")
    with pytest.raises(ServiceError, match="is damaged"):
        train(rows, PER_BATCH, checkpoint_dir=checkpoints, resume=True)
