"""What a distributed training is asked to do."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from streaming.errors import UsageError


class Mode(StrEnum):
    """How the workers' work is put together."""

    SYNCHRONOUS = "synchronous"  # all wait for one another, then all have the same weights
    ASYNCHRONOUS = "asynchronous"  # each adds its change to the server's weights when it is ready, one at a time
    HOGWILD = "hogwild"  # the same, but several at a time: none waits, and now and then a change is lost


class Frequency(StrEnum):
    """How often it is put together."""

    BATCH = "batch"
    EPOCH = "epoch"


@dataclass(frozen=True)
class TrainerOptions:
    """Every setting of a training, all checked.

    Attributes:
        workers: Spark tasks that train at the same time.
        batch_size: images per step of all workers together; each takes its share, so that a step of the synchronous
            mode is the step of one process with this batch size.
        threads: TensorFlow's, in each worker.
        timeout_s: a worker that says nothing for so long is given up, and started again if Spark has tries left.
        optimizer: as Keras names it, e.g. `adam`, or the configuration that `keras.optimizers.serialize` gives.
        class_weights: class → how much an image of it counts in the loss; 1 for those not named.
        augment: mirror, turn, crop and light each image anew in every epoch.
        mirror: whether augmentation may swap left and right.
        mixed_precision: compute in bfloat16 where a GPU is present.
        seed: of initial weights, order and altered copies.
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
                raise UsageError(f"{name} is one of {', '.join(kind)}, got {getattr(self, name)!r}") from None
        least = {"workers": 1, "batch_size": 1, "epochs": 1, "threads": 1, "timeout_s": 1, "seed": 0}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise UsageError(f"{name} is at least {low}, got {getattr(self, name)}")
        if not 0 < self.learning_rate < float("inf"):
            raise UsageError(f"the learning rate is above 0, got {self.learning_rate}")

    @property
    def local_batch(self) -> int:
        """Images that one worker takes per step."""
        return max(1, self.batch_size // self.workers)

    @property
    def waits(self) -> bool:
        """Whether the workers wait for one another."""
        return self.mode is Mode.SYNCHRONOUS
