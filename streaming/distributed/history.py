"""The history of a training: counts per epoch and worker, and metrics derived from them."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import numpy as np

from streaming.distributed.options import TrainerOptions
from streaming.distributed.shared_weights import Lost

MAX_PROCESS_CHARS = 300
CLIP = 1e-7  # distance from 0 and 1 to which Keras clips probabilities before taking the logarithm


@dataclass(frozen=True)
class Counts:
    """Sums over images; `loss` is computed from logits, `clipped_loss` from clipped probabilities, both in nats."""

    rows: int = 0
    loss: float = 0.0
    clipped_loss: float = 0.0
    correct: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            self.rows + other.rows,
            self.loss + other.loss,
            self.clipped_loss + other.clipped_loss,
            self.correct + other.correct,
        )

    @property
    def log_loss(self) -> float:
        return self.loss / self.rows if self.rows else float("nan")

    @property
    def accuracy(self) -> float:
        return self.correct / self.rows if self.rows else float("nan")

    @classmethod
    def of(cls, logits: "np.ndarray[Any, np.dtype[np.float32]]", truth: "np.ndarray[Any, np.dtype[np.int64]]") -> Self:
        """Compute counts from logits (N, 1) of the second class or (N, C), and class indices (N,)."""
        z = logits.astype(np.float64)
        if z.shape[1] == 1:
            z = np.concatenate([np.zeros_like(z), z], axis=1)
        at = np.arange(len(z))
        normaliser = np.logaddexp.reduce(z, axis=1)
        losses = normaliser - z[at, truth]
        clipped = -np.log(np.clip(np.exp(-losses), CLIP, 1 - CLIP))
        return cls(len(z), float(losses.sum()), float(clipped.sum()), int((z.argmax(axis=1) == truth).sum()))


@dataclass(frozen=True)
class WorkerEpoch:
    """One worker's epoch.

    Attributes:
        epoch: number of the epoch, from 0.
        training: counts on training images, each before its own step.
        validation: counts on validation images after the epoch.
        bytes: bytes sent and received by the worker so far.
        process: host:pid of the worker.
    """

    worker: int
    epoch: int
    seconds: float
    training: Counts
    validation: Counts
    bytes: int = 0
    process: str = ""

    @classmethod
    def from_meta(cls, worker: int, epoch: int, meta: Mapping[str, Any]) -> Self:
        """Parse a worker's report; raises KeyError, TypeError or ValueError if it is invalid."""
        counts = {name: Counts(**meta[name]) for name in ("training", "validation")}
        process = str(meta.get("process", ""))[:MAX_PROCESS_CHARS]
        return cls(worker, epoch, float(meta["seconds"]), **counts, bytes=int(meta["bytes"]), process=process)


@dataclass(frozen=True)
class EpochRecord:
    """An epoch that all workers have finished."""

    epoch: int
    seconds: float
    learning_rate: float
    workers: tuple[WorkerEpoch, ...]

    @property
    def training(self) -> Counts:
        return sum((one.training for one in self.workers), Counts())

    @property
    def validation(self) -> Counts:
        return sum((one.validation for one in self.workers), Counts())

    def logs(self) -> dict[str, float]:
        """Return the logs for Keras callbacks."""
        logs = {"loss": self.training.log_loss, "accuracy": self.training.accuracy}
        if self.validation.rows:
            logs |= {"val_loss": self.validation.log_loss, "val_accuracy": self.validation.accuracy}
        return logs

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Self:
        workers = (WorkerEpoch(**one | _counts(one)) for one in record["workers"])
        return cls(record["epoch"], record["seconds"], record["learning_rate"], tuple(workers))


@dataclass
class History:
    """The history of a training from its first epoch.

    Attributes:
        mode, frequency: how the workers' updates were combined.
        parameters: number of trainable parameters.
        staleness: number of updates by others between a worker's read and its push → count, over all workers.
        lost: updates lost by races between writers.
        bytes_moved: bytes between workers and server, in both directions.
        events: failures that were recovered from, one line each.
        stopped_early: whether a callback stopped the training.
    """

    mode: str
    frequency: str
    workers: int
    parameters: int = 0
    epochs: list[EpochRecord] = field(default_factory=list)
    seconds: float = 0.0
    staleness: dict[int, int] = field(default_factory=dict)
    lost: Lost = field(default_factory=Lost)
    bytes_moved: int = 0
    events: list[str] = field(default_factory=list)
    stopped_early: bool = False

    @classmethod
    def begin(cls, options: TrainerOptions, parameters: int) -> Self:
        return cls(str(options.mode), str(options.frequency), options.workers, parameters)

    @property
    def images_per_second(self) -> float:
        """Throughput without the first epoch, in which TensorFlow compiles."""
        later = self.epochs[1:] or self.epochs
        seconds = sum(one.seconds for one in later)
        return sum(one.training.rows for one in later) / seconds if seconds else 0.0

    @property
    def mean_staleness(self) -> float:
        n = sum(self.staleness.values())
        return sum(late * times for late, times in self.staleness.items()) / n if n else 0.0

    def as_record(self) -> dict[str, Any]:
        """Return the history for JSON."""
        return asdict(self)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Self:
        """Parse the result of `as_record`; raises KeyError, TypeError or ValueError if it is invalid."""
        values = dict(record)
        values["epochs"] = [EpochRecord.from_record(one) for one in values["epochs"]]
        values["staleness"] = {int(late): int(times) for late, times in values["staleness"].items()}
        values["lost"] = Lost(**values["lost"])
        return cls(**values)


def summed_staleness(*found: Mapping[int, int]) -> dict[int, int]:
    """Add up the staleness counts of several workers or runs, sorted by staleness."""
    total: Counter[int] = Counter()
    for one in found:
        total.update(one)
    return dict(sorted(total.items()))


def _counts(record: Mapping[str, Any]) -> dict[str, Counts]:
    return {name: Counts(**record[name]) for name in ("training", "validation")}
