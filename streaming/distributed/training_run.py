"""The state of a training that the threads of all workers share."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic
from typing import Any

from streaming.distributed.barrier import BrokenError
from streaming.distributed.history import EpochRecord, WorkerEpoch
from streaming.distributed.options import TrainerOptions
from streaming.distributed.protocol import Channel, LostPeerError, MessageKind, PeerMessage, Values
from streaming.errors import ServiceError


@dataclass(frozen=True)
class State:
    """Weights (N,) float32, optimizer state (M,) float32, and the number of finished epochs."""

    weights: Values
    optimizer: Values
    epoch: int = 0


@dataclass(frozen=True)
class EpochDecision:
    """The driver's decision at the end of an epoch."""

    stop: bool
    learning_rate: float


@dataclass(frozen=True)
class WorkerProgress:
    """A worker's progress: `epoch` counts from 0 and is -1 while the worker reads its images."""

    worker: int
    epoch: int
    rows: int


OnEpoch = Callable[[EpochRecord, State], EpochDecision]


@dataclass
class Callbacks:
    """Callbacks of the server, called from its threads.

    Attributes:
        epoch: called when all workers have finished an epoch; one call at a time.
        progress: called periodically.
        lost: called with (worker, task attempt, reason) when a worker is lost.
        ready: called with a worker's report on the images that it has read.
        failed: called when the training cannot continue.
    """

    epoch: OnEpoch
    progress: Callable[[WorkerProgress], None] = lambda _: None
    lost: Callable[[int, int, str], None] = lambda *_: None
    ready: Callable[[int, dict[str, Any]], None] = lambda *_: None
    failed: Callable[[], None] = lambda: None


class TrainingRun:
    """The state of one training.

    Attributes:
        state: state after the last epoch that all workers have finished.
        decision: the driver's decision after that epoch.
        error: why the training cannot continue, if so.
        lock: held while any of these changes.
    """

    def __init__(self, options: TrainerOptions, state: State, decision: EpochDecision, callbacks: Callbacks) -> None:
        self.options = options
        self.state = state
        self.decision = decision
        self.callbacks = callbacks
        self.error: ServiceError | None = None
        self.lock = threading.RLock()
        self._since: float | None = None

    def check(self) -> None:
        """Raise BrokenError if the training cannot continue."""
        if self.error is not None:
            raise BrokenError(str(self.error))

    def start_clock(self) -> None:
        """Start the clock of the first epoch unless one is running."""
        self._since = self._since or monotonic()

    def finish(self, workers: tuple[WorkerEpoch, ...], state: State) -> None:
        """Report the epoch that led to `state` to the driver and store its decision."""
        now = monotonic()
        seconds, self._since = now - (self._since or now), now
        record = EpochRecord(state.epoch - 1, seconds, self.decision.learning_rate, workers)
        self.state = state
        decision = self.callbacks.epoch(record, state)
        self.decision = EpochDecision(decision.stop or state.epoch >= self.options.epochs, decision.learning_rate)

    def meta(self, *, stop: bool) -> dict[str, Any]:
        """Return the parameters of the next epoch for the workers."""
        return {"stop": stop, "learning_rate": self.decision.learning_rate}

    def until_ready(self, channel: Channel, worker: int) -> PeerMessage:
        """Wait until a worker has read its images, and return its report."""
        while (message := channel.receive()).kind is MessageKind.PROGRESS:
            self.callbacks.progress(WorkerProgress(worker, -1, message.rows))
        if message.kind is not MessageKind.READY:
            raise out_of_turn(message)
        self.callbacks.ready(worker, dict(message.meta))
        return message

    def report_progress(self, worker: int, message: PeerMessage) -> None:
        """Report a worker's progress."""
        self.callbacks.progress(WorkerProgress(worker, message.epoch, message.rows))


def worker_epoch(message: PeerMessage) -> WorkerEpoch:
    """Parse a worker's report on an epoch; raises LostPeerError if it is invalid."""
    try:
        return WorkerEpoch.from_meta(message.worker, message.epoch, message.meta)
    except (KeyError, TypeError, ValueError) as error:
        raise LostPeerError(f"sent an invalid report on an epoch: {error}") from error


def out_of_turn(message: PeerMessage) -> LostPeerError:
    return LostPeerError(f"sent {message.kind.name} out of turn")
