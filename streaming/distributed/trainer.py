"""The driver of a distributed training."""

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, replace
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np
from py4j.protocol import Py4JError
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F  # noqa: N812  as Spark's own documentation writes it

from models.decode import DEFAULT_LIMITS, Limits
from streaming.distributed.callback_state import callback_states, restore_callbacks
from streaming.distributed.checkpoint import Checkpoint, read_checkpoint
from streaming.distributed.history import EpochRecord, History, summed_staleness
from streaming.distributed.network import NetworkParts, TrainableNetwork
from streaming.distributed.options import TrainerOptions
from streaming.distributed.server import ParameterServer
from streaming.distributed.shards import shard
from streaming.distributed.training_run import Callbacks, EpochDecision, State, WorkerProgress
from streaming.distributed.worker import DONE_DDL, WorkerTask, train_partition
from streaming.errors import ConfigurationError, DataError, ServiceError, reported

if TYPE_CHECKING:
    import keras

OnProgress = Callable[[WorkerProgress], None]
OnEpoch = Callable[[EpochRecord], None]


@dataclass(frozen=True)
class Trained:
    """The result of a training.

    Attributes:
        model: the given Keras model with the trained weights.
        classes: class names in the order of the outputs.
        bad: image → why it could not be read, for the first ones.
        n_bad: number of images that could not be read.
    """

    model: "keras.Model"
    classes: tuple[str, ...]
    history: History
    bad: dict[str, str]
    n_bad: int


@dataclass(frozen=True)
class DistributedTrainer:
    """Trains a Keras model from pixels to logits on the partitions of a DataFrame.

    The model maps uint8 (N, H, W, 3) to float32 logits, (N, 1) for two classes or (N, C); only its trainable weights
    are sent over the network. `models.cnn.build_network` builds such models.

    Attributes:
        callbacks: Keras callbacks, run on the driver at the end of every epoch; they may change the learning rate and
            stop the training.
        checkpoint_dir: folder for a checkpoint after every epoch, for `fit(resume=True)`.
        on_epoch: called after each epoch, from another thread.
        on_progress: called periodically, from other threads.

    Example:
        >>> options = TrainerOptions(mode="synchronous", frequency="epoch", workers=4, epochs=10)
        >>> trained = DistributedTrainer(build_network("cnn_gray", 2), options).fit(rows)
    """

    model: "keras.Model"
    options: TrainerOptions
    _: KW_ONLY
    callbacks: Sequence["keras.callbacks.Callback"] = ()
    checkpoint_dir: Path | None = None
    limits: Limits = DEFAULT_LIMITS
    on_epoch: OnEpoch = lambda _: None
    on_progress: OnProgress = lambda _: None

    def fit(self, rows: DataFrame, *, resume: bool = False) -> Trained:
        """Train.

        Args:
            rows: columns image_id, label (string), source (unique), content (bytes; null if the image is in the file
                `source`), and validation (boolean): whether the image is used for validation only.
            resume: continue after the last epoch in `checkpoint_dir`, with the state of the learning rate,
                `ReduceLROnPlateau` and `EarlyStopping`.

        Raises:
            ServiceError: there are fewer than two classes, the model does not suit them, no image can be decoded,
                workers fail more often than Spark retries, or the weights are not finite.
        """
        spark = rows.sparkSession
        _check_slots(spark, self.options)
        labels = rows.where("NOT validation").select("label").distinct().collect()
        classes = tuple(sorted(row.label for row in labels))
        self._check(classes)
        return _Run(self, classes).train(
            shard(rows.where(F.col("label").isin(*classes)), self.options.workers, self.options.seed), resume
        )

    def _check(self, classes: tuple[str, ...]) -> None:
        if len(classes) < 2:  # noqa: PLR2004
            raise DataError(f"training needs images of at least two classes, got {list(classes)}")
        outputs = self.model.output_shape[-1]
        if outputs != (1 if len(classes) == 2 else len(classes)):  # noqa: PLR2004
            raise ConfigurationError(f"the model outputs {outputs} logits, which does not suit {len(classes)} classes")
        unknown = set(self.options.class_weights or {}) - set(classes)
        if unknown:
            raise ConfigurationError(f"class weights for unknown classes: {', '.join(sorted(unknown))}")


class _Run:
    """One call of `fit`."""

    def __init__(self, trainer: DistributedTrainer, classes: tuple[str, ...]) -> None:
        import keras

        self.options, self.classes, self._trainer = trainer.options, classes, trainer
        self._group = f"train-cnn-{uuid4().hex}"
        self._bad: dict[int, tuple[dict[str, str], int]] = {}
        try:
            optimizer = keras.optimizers.get(self.options.optimizer)
        except (ValueError, TypeError) as error:
            raise ConfigurationError(
                f"unknown optimizer {self.options.optimizer!r}: expected one of Keras's, such as adam, adamw, sgd or "
                f"rmsprop"
            ) from error
        optimizer.learning_rate = self.options.learning_rate
        self.parts = NetworkParts.of(trainer.model, optimizer)
        self._network = TrainableNetwork(self.parts, replace(self.options, mixed_precision=False))
        model = self._network.model
        model.compile(optimizer)
        self._callbacks = keras.callbacks.CallbackList(list(trainer.callbacks), model=model)
        self.history = History.begin(self.options, self._network.n_weights)
        self._earlier, self._since = self.history, 0.0

    def train(self, rows: DataFrame, resume: bool) -> Trained:
        state = State(self._network.weights, self._network.optimizer)
        self._callbacks.on_train_begin()
        if resume:
            state = self._resumed(state)
        if not self._network.model.stop_training:
            self._callbacks.on_epoch_begin(state.epoch)
        decision = self._decision(state.epoch)
        callbacks = Callbacks(
            self._end_epoch, self._trainer.on_progress, self._on_lost, self._on_ready, failed=self._cancel
        )
        spark, self._spark = rows.sparkSession, rows.sparkSession
        host = spark.conf.get("spark.driver.host") or "127.0.0.1"
        self._earlier, self._since = replace(self.history), monotonic()
        with ParameterServer(self.options, state, decision, callbacks, host) as server:
            self._server = server
            if not decision.stop:
                self._run_job(rows, server)
            final = server.mode.final_state()
            self._update_totals()
            self.history.lost = server.mode.lost()  # after all workers have ended
        self._network.weights = final.weights
        self._callbacks.on_train_end()  # may restore the best epoch's weights
        self._trainer.model.set_weights(self._network.model.get_weights())
        bad = {name: why for named, _ in self._bad.values() for name, why in named.items()}
        return Trained(self._trainer.model, self.classes, self.history, bad, sum(n for _, n in self._bad.values()))

    def _run_job(self, rows: DataFrame, server: ParameterServer) -> None:
        parts = self._spark.sparkContext.broadcast(self.parts)
        task = WorkerTask(self.options, self.classes, server.address, server.token, server.sizes, self._trainer.limits)

        def run(batches: Any) -> Any:
            return train_partition(batches, lambda: parts.value, task)

        self._spark.sparkContext.setJobGroup(self._group, "train a CNN", interruptOnCancel=True)
        try:
            done = rows.mapInArrow(reported(run), DONE_DDL, barrier=self.options.waits)
            # Spark retries a failed barrier stage only if its result is shuffled.
            (done.repartition(1) if self.options.waits else done).collect()
        except (PySparkException, Py4JError) as error:
            if server.run.error is not None:
                raise server.run.error from error
            if self.history.events:
                epoch = server.run.state.epoch
                hint = f"use --resume to continue after epoch {epoch}" if epoch else "no epoch was finished"
                failure = f"the workers failed too often; last failure: {self.history.events[-1]}"
                raise ServiceError(f"{failure}; {hint}") from error
            raise
        finally:
            self._spark.sparkContext.setLocalProperty("spark.jobGroup.id", None)  # type: ignore[arg-type]  # clears it
            parts.unpersist()

    def _resumed(self, fresh: State) -> State:
        if self._trainer.checkpoint_dir is None:
            raise ConfigurationError("a training can only be resumed with a checkpoint directory")
        found = read_checkpoint(self._trainer.checkpoint_dir)
        differing = [name for name, value in found.settings.items() if self._settings().get(name) != value]
        if differing or len(found.state.weights) != len(fresh.weights):
            what = ", ".join(differing) or "network"
            raise ConfigurationError(
                f"the checkpoint is of a training with another {what}: train again without --resume"
            )
        restore_callbacks(self._trainer.callbacks, found.callbacks)
        model = self._network.model
        if found.learning_rate is not None:
            model.optimizer.learning_rate = found.learning_rate
        model.stop_training = found.history.stopped_early
        self.history = found.history
        return found.state

    def _settings(self) -> dict[str, Any]:
        """Return the settings that must not change when a training is resumed."""
        given = asdict(self.options)
        for name in ("epochs", "timeout_s", "threads"):
            del given[name]
        given["optimizer"] = self.options.optimizer if isinstance(self.options.optimizer, str) else "configured"
        return given | {"classes": list(self.classes), "parameters": self.history.parameters}

    def _end_epoch(self, record: EpochRecord, state: State) -> EpochDecision:
        if not np.isfinite(state.weights).all():
            raise ServiceError(
                f"the weights are not finite after epoch {record.epoch + 1}: the training has diverged; reduce "
                "--learning-rate"
            )
        self.history.epochs.append(record)
        self._update_totals()
        self._network.weights = state.weights
        self._callbacks.on_epoch_end(record.epoch, record.logs())
        self.history.stopped_early = bool(self._network.model.stop_training)
        self._write_checkpoint(state)  # after the callbacks of this epoch
        self._trainer.on_epoch(record)
        if not self.history.stopped_early and state.epoch < self.options.epochs:
            self._callbacks.on_epoch_begin(state.epoch)
        return self._decision(state.epoch)

    def _write_checkpoint(self, state: State) -> None:
        if self._trainer.checkpoint_dir is None:
            return
        rate = float(self._network.model.optimizer.learning_rate)
        states = callback_states(self._trainer.callbacks)
        Checkpoint(state, self.history, self._settings(), rate, states).write(self._trainer.checkpoint_dir)

    def _decision(self, epoch: int) -> EpochDecision:
        model = self._network.model
        stop = epoch >= self.options.epochs or bool(model.stop_training)
        return EpochDecision(stop, float(model.optimizer.learning_rate))

    def _update_totals(self) -> None:
        """Update the totals of the history, including those of the resumed run."""
        earlier, server = self._earlier, self._server
        self.history.seconds = earlier.seconds + monotonic() - self._since
        self.history.bytes_moved = earlier.bytes_moved + server.bytes_moved
        self.history.staleness = summed_staleness(earlier.staleness, *server.mode.staleness.values())

    def _on_ready(self, worker: int, meta: dict[str, Any]) -> None:
        bad = meta.get("bad")
        self._bad[worker] = (dict(bad) if isinstance(bad, dict) else {}, int(meta.get("n_bad", 0)))

    def _cancel(self) -> None:
        """Cancel the job, since a retry would fail again."""
        self._spark.sparkContext.cancelJobGroup(self._group)

    def _on_lost(self, worker: int, attempt: int, why: str) -> None:
        self.history.events.append(f"worker {worker}: {why}")
        context = self._spark.sparkContext._jsc
        if context is not None:  # a worker that hangs would never end its task; Spark retries a killed one
            context.sc().killTaskAttempt(attempt, True, why[:200])


def _check_slots(spark: SparkSession, options: TrainerOptions) -> None:
    slots = spark.sparkContext.defaultParallelism
    if options.waits and slots < options.workers:
        raise ConfigurationError(
            f"{options.workers} synchronous workers need as many slots, Spark has {slots}: use a master such as "
            f"local[{options.workers}], or fewer workers"
        )
