"""Where a training stands, and what the driver says to that."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic
from typing import Any

from streaming.distributed.barrier import BrokenError
from streaming.distributed.history import EpochRecord, WorkerEpoch
from streaming.distributed.options import TrainerOptions
from streaming.distributed.protocol import Channel, Kind, LostPeerError, Message, Values
from streaming.errors import ServiceError


@dataclass(frozen=True)
class State:
    """Where a training stands: its numbers in one row each, and the epochs that are done."""

    weights: Values
    optimizer: Values
    epoch: int = 0


@dataclass(frozen=True)
class Answer:
    """What the driver says at the end of an epoch."""

    stop: bool
    learning_rate: float


@dataclass(frozen=True)
class Progress:
    """How far a worker is: `epoch` counts from 0, -1 while it reads its images."""

    worker: int
    epoch: int
    rows: int


OnEpoch = Callable[[EpochRecord, State], Answer]


@dataclass
class Callbacks:
    """What the server tells, from its threads.

    Attributes:
        epoch: all workers have finished one; one call at a time.
        progress: now and then.
        lost: (worker, attempt of its task, why): it is given up.
        ready: what a worker says of the images that it has read.
        failed: no worker can go on.
    """

    epoch: OnEpoch
    progress: Callable[[Progress], None] = lambda _: None
    lost: Callable[[int, int, str], None] = lambda *_: None
    ready: Callable[[int, dict[str, Any]], None] = lambda *_: None
    failed: Callable[[], None] = lambda: None


class Course:
    """The course of one training, which the threads of all workers share.

    Attributes:
        state: after the last epoch that all have finished.
        answer: the driver's to that.
        error: why no worker can go on, if so.
        lock: held while any of these changes.
    """

    def __init__(self, options: TrainerOptions, state: State, answer: Answer, callbacks: Callbacks) -> None:
        self.options = options
        self.state = state
        self.answer = answer
        self.callbacks = callbacks
        self.error: ServiceError | None = None
        self.lock = threading.RLock()
        self._since: float | None = None

    def check(self) -> None:
        """Raises BrokenError if no worker can go on."""
        if self.error is not None:
            raise BrokenError(str(self.error))

    def start_clock(self) -> None:
        """The first epoch begins, unless one is under way."""
        self._since = self._since or monotonic()

    def finish(self, workers: tuple[WorkerEpoch, ...], state: State) -> None:
        """All workers have finished the epoch that led to `state`; the driver hears of it, and answers."""
        now = monotonic()
        seconds, self._since = now - (self._since or now), now
        record = EpochRecord(state.epoch - 1, seconds, self.answer.learning_rate, workers)
        self.state = state
        answer = self.callbacks.epoch(record, state)
        self.answer = Answer(answer.stop or state.epoch >= self.options.epochs, answer.learning_rate)

    def meta(self, *, stop: bool) -> dict[str, Any]:
        """What every worker is told before an epoch."""
        return {"stop": stop, "learning_rate": self.answer.learning_rate}

    def until_ready(self, channel: Channel, worker: int) -> Message:
        """What a worker says once it has read its images."""
        while (message := channel.receive()).kind is Kind.PROGRESS:
            self.callbacks.progress(Progress(worker, -1, message.rows))
        if message.kind is not Kind.READY:
            raise out_of_turn(message)
        self.callbacks.ready(worker, dict(message.meta))
        return message

    def note(self, worker: int, message: Message) -> None:
        """A worker is at work."""
        self.callbacks.progress(Progress(worker, message.epoch, message.rows))


def worker_epoch(message: Message) -> WorkerEpoch:
    """What a worker told of an epoch; raises LostPeerError if it cannot be read."""
    try:
        return WorkerEpoch.from_meta(message.worker, message.epoch, message.meta)
    except (KeyError, TypeError, ValueError) as error:
        raise LostPeerError(f"told an epoch that cannot be read: {error}") from error


def out_of_turn(message: Message) -> LostPeerError:
    return LostPeerError(f"said {message.kind.name} out of turn")
