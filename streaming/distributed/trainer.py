"""The driver's side of a distributed training: plan, serve, watch, and give back what was learned."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
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
from streaming.distributed.course import Answer, Callbacks, Progress, State
from streaming.distributed.history import EpochRecord, History, summed_staleness
from streaming.distributed.network import Network, NetworkParts
from streaming.distributed.options import TrainerOptions
from streaming.distributed.server import ParameterServer
from streaming.distributed.shards import shard
from streaming.distributed.worker import DONE_DDL, WorkerTask, train_partition
from streaming.errors import ConfigurationError, DataError, ServiceError, reported

if TYPE_CHECKING:
    import keras

OnProgress = Callable[[Progress], None]
OnEpoch = Callable[[EpochRecord], None]


@dataclass(frozen=True)
class Trained:
    """What a training gave.

    Attributes:
        model: the Keras model that was given, with the weights that were learned.
        bad: image → why no worker could read it, of the first ones.
    """

    model: "keras.Model"
    classes: tuple[str, ...]
    history: History
    bad: dict[str, str]
    n_bad: int


class DistributedTrainer:
    """Trains a Keras model from pixels to logits on the partitions of a DataFrame.

    The model takes uint8 (N, H, W, 3) and gives float32 logits, (N, 1) for two classes or (N, C); only its trainable
    weights travel. `models.cnn.build_network` builds such models.

    Example:
        >>> options = TrainerOptions(mode="synchronous", frequency="epoch", workers=4, epochs=10)
        >>> trained = DistributedTrainer(build_network("cnn_gray", 2), options).fit(rows)
    """

    def __init__(
        self,
        model: "keras.Model",
        options: TrainerOptions,
        *,
        callbacks: Sequence["keras.callbacks.Callback"] = (),
        checkpoint_dir: Path | None = None,
        limits: Limits = DEFAULT_LIMITS,
        on_epoch: OnEpoch = lambda _: None,
        on_progress: OnProgress = lambda _: None,
    ) -> None:
        """Args:
        callbacks: Keras' own, run on the driver at the end of every epoch: they see the losses and the model, may
            change the learning rate and stop the training.
        checkpoint_dir: where the state after every epoch is kept, for `fit(resume=True)`.
        limits: what is decoded, and what that may cost.
        on_epoch: called after each epoch, from another thread.
        on_progress: called now and then, from other threads.
        """
        self.model = model
        self.options = options
        self._keras_callbacks = callbacks
        self._checkpoint_dir = checkpoint_dir
        self._limits = limits
        self._on_epoch = on_epoch
        self._on_progress = on_progress

    def fit(self, rows: DataFrame, *, resume: bool = False) -> Trained:
        """Train.

        Args:
            rows: image_id, label (string), source, which tells an image from all others, content (bytes; null where the
                file `source` holds the image), and validation (boolean): whether the image is only to be asked about.
            resume: continue after the last epoch of `checkpoint_dir`, with the state of the learning rate, of
                `ReduceLROnPlateau` and of `EarlyStopping` as they were.

        Raises:
            ServiceError: fewer than two classes, a model that does not fit, no image that decodes, workers that fail
                more often than Spark tries, or weights that are no longer finite.
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
            raise ConfigurationError(f"the model gives {outputs} logits, which does not suit {len(classes)} classes")
        unknown = set(self.options.class_weights or {}) - set(classes)
        if unknown:
            raise ConfigurationError(f"there are weights for classes that no image has: {', '.join(sorted(unknown))}")


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
                f"Keras knows no optimizer {self.options.optimizer!r}; it knows adam, adamw, sgd, rmsprop and others"
            ) from error
        optimizer.learning_rate = self.options.learning_rate
        self.parts = NetworkParts.of(trainer.model, optimizer)
        self._network = Network(self.parts, replace(self.options, mixed_precision=False))
        model = self._network.model
        model.compile(optimizer)
        self._callbacks = keras.callbacks.CallbackList(list(trainer._keras_callbacks), model=model)
        self.history = History.begin(self.options, self._network.n_weights)
        self._earlier, self._since = self.history, 0.0

    def train(self, rows: DataFrame, resume: bool) -> Trained:
        state = State(self._network.weights, self._network.optimizer)
        self._callbacks.on_train_begin()
        if resume:
            state = self._resumed(state)
        if not self._network.model.stop_training:
            self._callbacks.on_epoch_begin(state.epoch)
        answer = self._answer(state.epoch)
        told = Callbacks(
            self._end_epoch, self._trainer._on_progress, self._on_lost, self._on_ready, failed=self._cancel
        )
        spark, self._spark = rows.sparkSession, rows.sparkSession
        host = spark.conf.get("spark.driver.host") or "127.0.0.1"
        self._earlier, self._since = replace(self.history), monotonic()
        with ParameterServer(self.options, state, answer, told, host) as server:
            self._server = server
            if not answer.stop:
                self._run_job(rows, server)
            final = server.mode.final_state()
            self._sum_up()
            self.history.lost = server.mode.lost()  # now that no worker writes any more
        self._network.weights = final.weights
        self._callbacks.on_train_end()  # may bring back the best epoch's weights
        self._trainer.model.set_weights(self._network.model.get_weights())
        bad = {name: why for named, _ in self._bad.values() for name, why in named.items()}
        return Trained(self._trainer.model, self.classes, self.history, bad, sum(n for _, n in self._bad.values()))

    def _run_job(self, rows: DataFrame, server: ParameterServer) -> None:
        parts = self._spark.sparkContext.broadcast(self.parts)
        task = WorkerTask(self.options, self.classes, server.address, server.token, server.sizes, self._trainer._limits)

        def run(batches: Any) -> Any:
            return train_partition(batches, lambda: parts.value, task)

        self._spark.sparkContext.setJobGroup(self._group, "train a CNN", interruptOnCancel=True)
        try:
            done = rows.mapInArrow(reported(run), DONE_DDL, barrier=self.options.waits)
            # Spark tries a failed stage of waiting tasks again only if its result goes into a shuffle.
            (done.repartition(1) if self.options.waits else done).collect()
        except (PySparkException, Py4JError) as error:
            if server.course.error is not None:
                raise server.course.error from error
            if self.history.events:
                tried = f"the workers failed too often, at last: {self.history.events[-1]}"
                raise ServiceError(f"{tried}; {_resume_hint(server.course.state.epoch)}") from error
            raise
        finally:
            self._spark.sparkContext.setLocalProperty("spark.jobGroup.id", None)  # type: ignore[arg-type]  # clears it
            parts.unpersist()

    def _resumed(self, fresh: State) -> State:
        if self._trainer._checkpoint_dir is None:
            raise ConfigurationError("a training can only be resumed from a directory of checkpoints")
        found = read_checkpoint(self._trainer._checkpoint_dir)
        differing = [name for name, value in found.settings.items() if self._settings().get(name) != value]
        if differing or len(found.state.weights) != len(fresh.weights):
            what = ", ".join(differing) or "network"
            raise ConfigurationError(
                f"the checkpoint is of a training with another {what}; train again without resuming"
            )
        restore_callbacks(self._trainer._keras_callbacks, found.callbacks)
        model = self._network.model
        if found.learning_rate is not None:
            model.optimizer.learning_rate = found.learning_rate
        model.stop_training = found.history.stopped_early
        self.history = found.history
        return found.state

    def _settings(self) -> dict[str, Any]:
        """What must be the same for a training to go on."""
        given = asdict(self.options)
        for name in ("epochs", "timeout_s", "threads"):
            del given[name]
        given["optimizer"] = self.options.optimizer if isinstance(self.options.optimizer, str) else "configured"
        return given | {"classes": list(self.classes), "parameters": self.history.parameters}

    def _end_epoch(self, record: EpochRecord, state: State) -> Answer:
        if not np.isfinite(state.weights).all():
            raise ServiceError(
                f"the weights are no longer finite after epoch {record.epoch + 1}: the training has diverged; learn "
                "more slowly"
            )
        self.history.epochs.append(record)
        self._sum_up()
        self._network.weights = state.weights
        self._callbacks.on_epoch_end(record.epoch, record.logs())
        self.history.stopped_early = bool(self._network.model.stop_training)
        self._write_checkpoint(state)  # with what the callbacks make of this epoch
        self._trainer._on_epoch(record)
        if not self.history.stopped_early and state.epoch < self.options.epochs:
            self._callbacks.on_epoch_begin(state.epoch)
        return self._answer(state.epoch)

    def _write_checkpoint(self, state: State) -> None:
        if self._trainer._checkpoint_dir is None:
            return
        rate = float(self._network.model.optimizer.learning_rate)
        states = callback_states(self._trainer._keras_callbacks)
        Checkpoint(state, self.history, self._settings(), rate, states).write(self._trainer._checkpoint_dir)

    def _answer(self, epoch: int) -> Answer:
        model = self._network.model
        stop = epoch >= self.options.epochs or bool(model.stop_training)
        return Answer(stop, float(model.optimizer.learning_rate))

    def _sum_up(self) -> None:
        """What was so far, in this run and in the one that it goes on from."""
        earlier, server = self._earlier, self._server
        self.history.seconds = earlier.seconds + monotonic() - self._since
        self.history.bytes_moved = earlier.bytes_moved + server.bytes_moved
        self.history.staleness = summed_staleness(earlier.staleness, *server.mode.staleness.values())

    def _on_ready(self, worker: int, meta: dict[str, Any]) -> None:
        bad = meta.get("bad")
        self._bad[worker] = (dict(bad) if isinstance(bad, dict) else {}, int(meta.get("n_bad", 0)))

    def _cancel(self) -> None:
        """Spark need not try again what would fail again."""
        self._spark.sparkContext.cancelJobGroup(self._group)

    def _on_lost(self, worker: int, attempt: int, why: str) -> None:
        self.history.events.append(f"worker {worker}: {why}")
        context = self._spark.sparkContext._jsc
        if context is not None:  # one that hangs would hold its task for good; killed, it is tried again
            context.sc().killTaskAttempt(attempt, True, why[:200])


def _check_slots(spark: SparkSession, options: TrainerOptions) -> None:
    slots = spark.sparkContext.defaultParallelism
    if options.waits and slots < options.workers:
        raise ConfigurationError(
            f"{options.workers} workers that wait for one another need as many slots, Spark has {slots}: "
            f"take a master such as local[{options.workers}], or fewer workers"
        )


def _resume_hint(epoch: int) -> str:
    return "nothing was learned yet" if epoch == 0 else f"resume it to go on after epoch {epoch}"
