"""Options of a distributed training."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from streaming.errors import UsageError


class Mode(StrEnum):
    """How the workers' updates are combined."""

    SYNCHRONOUS = "synchronous"  # workers wait for one another and have the same weights
    ASYNCHRONOUS = "asynchronous"  # each worker adds its update to the server's weights when it is ready, under a lock
    HOGWILD = "hogwild"  # the same without a lock: no worker waits, and some updates are lost


class Frequency(StrEnum):
    """How often the workers' updates are combined."""

    BATCH = "batch"
    EPOCH = "epoch"


@dataclass(frozen=True)
class TrainerOptions:
    """Options of a training, validated.

    Attributes:
        mode: how updates are combined.
        frequency: how often updates are combined.
        workers: number of Spark tasks that train at the same time.
        batch_size: number of images per step over all workers; a synchronous step equals that of a single process with
            this batch size.
        epochs: maximum number of epochs.
        learning_rate: initial learning rate.
        optimizer: Keras's name of an optimizer, e.g. `adam`, or the result of `keras.optimizers.serialize`.
        class_weights: class → weight of its images in the loss; default 1.
        augment: flip, rotate, crop and change the brightness of each image at random in every epoch.
        mirror: whether augmentation may flip images horizontally.
        mixed_precision: compute in bfloat16 on GPUs.
        threads: number of TensorFlow threads per worker.
        timeout_s: time without a message after which a worker is considered lost; Spark restarts it if it has attempts
            left.
        seed: random seed of initial weights, image order and augmentation.
    """

    mode: Mode = Mode.SYNCHRONOUS
    frequency: Frequency = Frequency.EPOCH
    workers: int = 2
    batch_size: int = 128
    epochs: int = 10
    learning_rate: float = 1e-3
    optimizer: str | dict[str, Any] = "adam"
    class_weights: dict[str, float] | None = None
    augment: bool = False
    mirror: bool = True
    mixed_precision: bool = False
    threads: int = 1
    timeout_s: float = 120.0
    seed: int = 42

    def __post_init__(self) -> None:
        for name, kind in (("mode", Mode), ("frequency", Frequency)):
            try:
                object.__setattr__(self, name, kind(getattr(self, name)))
            except ValueError:
                raise UsageError(f"{name} should be one of {', '.join(kind)}, got {getattr(self, name)!r}") from None
        least = {"workers": 1, "batch_size": 1, "epochs": 1, "threads": 1, "timeout_s": 1, "seed": 0}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise UsageError(f"{name} should be at least {low}, got {getattr(self, name)}")
        if not 0 < self.learning_rate < float("inf"):
            raise UsageError(f"learning_rate should be above 0, got {self.learning_rate}")

    @property
    def local_batch(self) -> int:
        """Number of images per step and worker."""
        return max(1, self.batch_size // self.workers)

    @property
    def waits(self) -> bool:
        """Whether the workers wait for one another."""
        return self.mode is Mode.SYNCHRONOUS
