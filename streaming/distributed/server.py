"""The parameter server: a thread per worker, on the driver, bound to the driver's address.

In the synchronous mode it only puts together what the workers bring: gradients at every step, or weights and optimizer
state at the end of every epoch. In the asynchronous modes it holds the weights. In all modes it hears of every epoch,
and decides with the driver's callbacks whether to go on.
"""

import hashlib
import secrets
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

import numpy as np

from streaming.distributed.history import EpochRecord, WorkerEpoch
from streaming.distributed.options import Mode, TrainerOptions
from streaming.distributed.protocol import Channel, Kind, LostPeerError, Message, Values, accept
from streaming.distributed.rendezvous import BrokenError, Rendezvous
from streaming.distributed.shared_weights import Lost, SharedWeights
from streaming.errors import ServiceError

TOKEN_BYTES = 32


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


@dataclass
class _Meeting:
    """The workers of one try of a synchronous training."""

    rendezvous: Rendezvous[Message, Message]
    attempts: dict[int, int] = field(default_factory=dict)
    started: bool = False


class ParameterServer:
    """Serves the workers of one training until it is closed; a context manager.

    Attributes:
        address: (host, port) for the workers.
        token: what they must know.
        state: after the last epoch that all have finished.
        error: why no worker can go on, if so.
    """

    def __init__(
        self, options: TrainerOptions, rows: int, state: State, answer: Answer, callbacks: Callbacks, host: str
    ) -> None:
        """Args:
        rows: images to train on, of all workers together.
        answer: what the first epoch begins with.
        host: the address to listen on.
        """
        self.options = options
        self._rows = rows
        self.state = state
        self.token = secrets.token_bytes(TOKEN_BYTES)
        self.error: ServiceError | None = None
        self._channels: set[Channel] = set()
        self._bytes_closed = 0
        self._answer = answer
        self._callbacks = callbacks
        self._sizes = frozenset({len(state.weights), len(state.optimizer), len(state.weights) + len(state.optimizer)})
        self._lock = threading.RLock()
        self._meeting = self._new_meeting()
        self._shared = SharedWeights(state.weights.copy(), locked=options.mode is not Mode.HOGWILD)
        self._own_optimizer: dict[int, Values] = {}
        self._done = dict.fromkeys(range(options.workers), state.epoch)
        self._seats: dict[int, int] = {}
        self._epochs: dict[int, dict[int, WorkerEpoch]] = {}
        self._since: float | None = None
        self._socket = socket.create_server((host, 0), backlog=options.workers * 2)
        self.address: tuple[str, int] = self._socket.getsockname()[:2]
        self._closed = False
        threading.Thread(target=self._listen, name="parameter server", daemon=True).start()

    def __enter__(self) -> "ParameterServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Take no more workers; those that are connected fail at their next word."""
        self._closed = True
        self._meeting.rendezvous.break_off("the training is over")
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def final_state(self) -> State:
        """The weights that the training ended with; in the asynchronous modes with all pushes, also of late workers."""
        if self.options.waits:
            return self.state
        return State(self._shared.read()[0], self.state.optimizer, self.state.epoch)

    @property
    def bytes_moved(self) -> int:
        """Between workers and server so far, both ways."""
        with self._lock:
            return self._bytes_closed + sum(one.sent + one.received for one in self._channels)

    @property
    def sizes(self) -> frozenset[int]:
        """The numbers of values that a frame may have."""
        return self._sizes

    @property
    def shared(self) -> SharedWeights:
        return self._shared

    def lost(self) -> Lost:
        return Lost() if self.options.waits else self._shared.lost()

    def _new_meeting(self) -> _Meeting:
        return _Meeting(Rendezvous(self.options.workers))

    def _listen(self) -> None:
        while not self._closed:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), name="worker", daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        channel = Channel(connection, self._sizes, self.options.timeout_s)
        try:
            accept(connection, self.token)
            connection.settimeout(self.options.timeout_s)
            worker, attempt = _read_hello(channel.receive(), self.options.workers)
        except (LostPeerError, OSError):
            connection.close()  # a stranger
            return
        with self._lock:
            self._channels.add(channel)
        try:
            if self.options.waits:
                self._talk_synchronous(channel, worker, attempt)
            else:
                self._talk_asynchronous(channel, worker, attempt)
        except LostPeerError as error:
            self._give_up(worker, attempt, str(error))
            self._tell_failure(channel, str(error))
        except BrokenError as error:
            self._tell_failure(channel, str(error))
        except ServiceError as error:
            self._fail(error)
            self._tell_failure(channel, str(error))
        except Exception as error:  # noqa: BLE001  a callback's; the training cannot go on
            self._fail(ServiceError(f"{type(error).__name__}: {error}"))
            self._tell_failure(channel, str(self.error))
        finally:
            with self._lock:
                self._channels.discard(channel)
                self._bytes_closed += channel.sent + channel.received
            channel.close()

    def _tell_failure(self, channel: Channel, why: str) -> None:
        with suppress(LostPeerError):
            channel.send(Message(Kind.FAILED, meta={"why": why[:2000]}))

    def _fail(self, error: ServiceError) -> None:
        with self._lock:
            first = self.error is None
            self.error = self.error or error
            self._meeting.rendezvous.break_off(str(self.error))
        if first:
            self._callbacks.failed()

    def _give_up(self, worker: int, attempt: int, why: str) -> None:
        with self._lock:
            seats = self._meeting.attempts if self.options.waits else self._seats
            if self._closed or seats.get(worker) != attempt:
                return  # another try has its place already
            if self.options.waits:
                self._meeting.rendezvous.break_off(f"worker {worker}: {why}")
        self._callbacks.lost(worker, attempt, why)

    def _check(self) -> None:
        if self.error is not None:
            raise BrokenError(str(self.error))

    # Synchronous: all meet.

    def _talk_synchronous(self, channel: Channel, worker: int, attempt: int) -> None:
        meeting = self._join(worker, attempt)

        def waiting(waited: float, missing: list[int]) -> None:
            channel.send(Message(Kind.PROGRESS))
            absent = [one for one in missing if one not in meeting.attempts]
            if absent and waited > self.options.timeout_s:
                raise BrokenError(f"{_names(absent)} did not connect within {self.options.timeout_s:.0f} s")

        def meet(message: Message, combine: Callable[[list[Message]], Message]) -> Message:
            return meeting.rendezvous.meet(worker, message, combine, waiting)

        ready = self._until_ready(channel, worker)
        channel.send(meet(ready, lambda all_of_them: self._start(meeting, all_of_them)))
        stop = self._answer.stop
        while not stop:
            message = channel.receive()
            match message.kind:
                case Kind.PROGRESS:
                    self._callbacks.progress(Progress(worker, message.epoch, message.rows))
                case Kind.REDUCE:
                    self._callbacks.progress(Progress(worker, message.epoch, message.step * self.options.local_batch))
                    channel.send(meet(message, _weighted_mean))
                case Kind.EPOCH:
                    answer = meet(message, self._end_epoch)
                    channel.send(answer)
                    stop = bool(answer.meta["stop"])
                case _:
                    raise LostPeerError(f"said {message.kind.name} out of turn")

    def _join(self, worker: int, attempt: int) -> _Meeting:
        with self._lock:
            self._check()
            meeting = self._meeting
            seated = meeting.attempts.get(worker)
            if seated is not None and seated > attempt:
                raise BrokenError("a later try has this worker's place")
            if seated is not None or meeting.started:
                meeting.rendezvous.break_off(f"worker {worker} started again")
                self._meeting = meeting = self._new_meeting()
            meeting.attempts[worker] = attempt
            return meeting

    def _start(self, meeting: _Meeting, ready: Sequence[Message]) -> Message:
        with self._lock:
            meeting.started = True
        rows = [one.rows for one in ready]
        if not sum(rows):
            raise ServiceError("no worker has an image that decodes to train on")
        self._since = monotonic()
        steps = -(-max(rows) // self.options.local_batch)
        return self._start_message(self.state.epoch, steps, stop=self._answer.stop)

    def _start_message(self, epoch: int, steps: int = 0, *, stop: bool) -> Message:
        weights, version = (self.state.weights, 0) if self.options.waits else self._shared.read()
        meta = {"stop": stop, "learning_rate": self._answer.learning_rate}
        return Message(Kind.START, 0, epoch, steps, 0, version, meta, np.concatenate([weights, self.state.optimizer]))

    def _end_epoch(self, messages: list[Message]) -> Message:
        if len({str(one.meta.get("digest")) for one in messages}) != 1:
            raise ServiceError("the workers' weights are no longer the same: they run on processors that differ")
        n = len(self.state.weights)
        values = messages[0].values
        if len(values) != n + len(self.state.optimizer):
            raise ServiceError("worker 0 did not send its weights")
        epoch = messages[0].epoch
        workers = tuple(_worker_epoch(one) for one in messages)
        self._finish(epoch, workers, State(values[:n].copy(), values[n:].copy(), epoch + 1))
        return self._next()

    def _next(self) -> Message:
        return Message(Kind.NEXT, meta={"stop": self._answer.stop, "learning_rate": self._answer.learning_rate})

    def _finish(self, epoch: int, workers: tuple[WorkerEpoch, ...], state: State) -> None:
        now = monotonic()
        seconds, self._since = now - (self._since or now), now
        record = EpochRecord(epoch, seconds, self._answer.learning_rate, workers)
        self.state = state
        answer = self._callbacks.epoch(record, state)
        self._answer = Answer(answer.stop or epoch + 1 >= self.options.epochs, answer.learning_rate)

    # Asynchronous: each for itself.

    def _talk_asynchronous(self, channel: Channel, worker: int, attempt: int) -> None:
        with self._lock:
            self._check()
            if self._seats.get(worker, -1) > attempt:
                raise BrokenError("a later try has this worker's place")
            self._seats[worker] = attempt
        ready = self._until_ready(channel, worker)
        with self._lock:
            self._since = self._since or monotonic()
            stop = self._answer.stop or self._done[worker] >= self.options.epochs
            start = self._start_message(self._done[worker], stop=stop)
            own = self._own_optimizer.get(worker)
        if own is not None:  # it goes on where its last try ended an epoch
            start.values[len(self.state.weights) :] = own
        channel.send(start)
        share = ready.rows / max(1, self._rows)
        while not stop:
            message = channel.receive()
            if self._seats[worker] != attempt:
                raise BrokenError("a later try has this worker's place")
            match message.kind:
                case Kind.PROGRESS:
                    self._callbacks.progress(Progress(worker, message.epoch, message.rows))
                case Kind.PUSH:
                    # Each worker's change counts by its share of the images, so that all of them make up one step.
                    self._shared.add(worker, message.values * np.float32(share), message.version)
                    weights, version = self._shared.read()
                    channel.send(Message(Kind.WEIGHTS, worker, version=version, values=weights))
                case Kind.EPOCH:
                    answer = self._end_own_epoch(worker, message)
                    channel.send(answer)
                    stop = bool(answer.meta["stop"])
                case _:
                    raise LostPeerError(f"said {message.kind.name} out of turn")

    def _end_own_epoch(self, worker: int, message: Message) -> Message:
        if len(message.values) != len(self.state.optimizer):
            raise LostPeerError("did not send its optimizer's state")
        with self._lock:
            epoch = self._done[worker]
            self._own_optimizer[worker] = message.values
            self._done[worker] += 1
            of_all = self._epochs.setdefault(epoch, {})
            of_all[worker] = _worker_epoch(message)
            if len(of_all) == self.options.workers:
                workers = tuple(of_all[one] for one in sorted(of_all))
                optimizer = np.array(np.mean(list(self._own_optimizer.values()), axis=0), np.float32)
                self._finish(epoch, workers, State(self._shared.read()[0], optimizer, epoch + 1))
            # A worker that is ahead of the others goes on; whether all shall stop is known when the last one is here.
            stop = self._answer.stop or self._done[worker] >= self.options.epochs
            meta = {"stop": stop, "learning_rate": self._answer.learning_rate}
        return Message(Kind.NEXT, worker, meta=meta)

    def _until_ready(self, channel: Channel, worker: int) -> Message:
        while (message := channel.receive()).kind is Kind.PROGRESS:
            self._callbacks.progress(Progress(worker, -1, message.rows))
        if message.kind is not Kind.READY:
            raise LostPeerError(f"said {message.kind.name} out of turn")
        self._callbacks.ready(worker, dict(message.meta))
        return message


def _read_hello(message: Message, workers: int) -> tuple[int, int]:
    attempt = message.meta.get("attempt")
    if message.kind is not Kind.HELLO or message.worker >= workers or not isinstance(attempt, int):
        raise LostPeerError("expected a worker's greeting")
    return message.worker, attempt


def digest(values: Values) -> str:
    """Tells whether two workers have the same numbers, to the last bit."""
    return hashlib.sha256(values.tobytes()).hexdigest()


def _weighted_mean(messages: list[Message]) -> Message:
    """The mean of the workers' values by their rows, added up in the workers' order, so that the same values give the
    same sum."""
    sizes = {len(one.values) for one in messages if one.rows}
    if len(sizes) != 1:
        raise ServiceError("the workers brought different numbers of values" if sizes else "no worker has any image")
    total = sum(one.rows for one in messages)
    mean = np.zeros(sizes.pop(), np.float32)
    for one in messages:
        if one.rows:
            mean += one.values * np.float32(one.rows / total)
    return Message(Kind.REDUCED, rows=total, values=mean)


def _worker_epoch(message: Message) -> WorkerEpoch:
    try:
        return WorkerEpoch.from_meta(message.worker, message.epoch, message.meta)
    except (KeyError, TypeError, ValueError) as error:
        raise LostPeerError(f"told an epoch that cannot be read: {error}") from error


def _names(workers: Sequence[int]) -> str:
    return ("worker " if len(workers) == 1 else "workers ") + ", ".join(map(str, workers))
