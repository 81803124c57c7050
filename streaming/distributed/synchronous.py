"""The synchronous mode: workers wait for one another at every step or epoch and continue with the same weights."""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from streaming.distributed.barrier import Barrier, BrokenError
from streaming.distributed.protocol import Channel, MessageKind, PeerMessage, Values
from streaming.distributed.shared_weights import Lost
from streaming.distributed.training_run import State, TrainingRun, out_of_turn, worker_epoch
from streaming.errors import DataError, ServiceError


@dataclass
class _Group:
    """The workers of one attempt."""

    barrier: Barrier[PeerMessage, PeerMessage]
    attempts: dict[int, int] = field(default_factory=dict)
    started: bool = False


class Synchronous:
    """Averages the workers' gradients at every step, or their weights and optimizer states at every epoch."""

    def __init__(self, run: TrainingRun) -> None:
        self._run = run
        self._group = self._new_group()

    @property
    def staleness(self) -> dict[int, Counter[int]]:
        """Always empty: the weights do not change between a worker's read and its step."""
        return {}

    def lost(self) -> Lost:
        """Return no lost updates: all workers have the same weights."""
        return Lost()

    def final_state(self) -> State:
        return self._run.state

    def serve(self, channel: Channel, worker: int, attempt: int) -> None:
        """Serve a worker's task attempt until it ends.

        Raises:
            LostPeerError: the worker is lost or violates the protocol.
            BrokenError: another worker is lost, or the attempt has been superseded.
            ServiceError: the training cannot continue.
        """
        run = self._run
        group = self._join(worker, attempt)

        def waiting(waited: float, missing: list[int]) -> None:
            channel.send(PeerMessage(MessageKind.PROGRESS))
            absent = [one for one in missing if one not in group.attempts]
            if absent and waited > run.options.timeout_s:
                raise BrokenError(f"{_names(absent)} did not connect within {run.options.timeout_s:.0f} s")

        def wait(message: PeerMessage, combine: Callable[[list[PeerMessage]], PeerMessage]) -> PeerMessage:
            return group.barrier.wait(worker, message, combine, waiting)

        ready = run.until_ready(channel, worker)
        start = wait(ready, lambda all_of_them: self._start(group, all_of_them))
        channel.send(start)
        stop = bool(start.meta["stop"])
        while not stop:
            message = channel.receive()
            match message.kind:
                case MessageKind.PROGRESS:
                    run.report_progress(worker, message)
                case MessageKind.REDUCE:
                    channel.send(wait(message, _weighted_mean))
                case MessageKind.EPOCH:
                    reply = wait(message, self._end_epoch)
                    channel.send(reply)
                    stop = bool(reply.meta["stop"])
                case _:
                    raise out_of_turn(message)

    def drop_worker(self, worker: int, attempt: int, why: str) -> bool:
        """Notify the other workers of the loss of a worker; return False if another attempt has already replaced it."""
        with self._run.lock:
            if self._group.attempts.get(worker) != attempt:
                return False
            self._group.barrier.abort(f"worker {worker}: {why}")
            return True

    def abort(self, why: str) -> None:
        """End the wait of all workers."""
        self._group.barrier.abort(why)

    def _new_group(self) -> _Group:
        return _Group(Barrier(self._run.options.workers))

    def _join(self, worker: int, attempt: int) -> _Group:
        with self._run.lock:
            self._run.check()
            group = self._group
            joined = group.attempts.get(worker)
            if joined is not None and joined > attempt:
                raise BrokenError("a later attempt has replaced this worker")
            if joined is not None or group.started:
                group.barrier.abort(f"worker {worker} was restarted")
                self._group = group = self._new_group()
            group.attempts[worker] = attempt
            return group

    def _start(self, group: _Group, ready: Sequence[PeerMessage]) -> PeerMessage:
        run = self._run
        with run.lock:
            group.started = True
            run.start_clock()
        rows = [one.rows for one in ready]
        if not sum(rows):
            raise DataError("no training image can be decoded")
        steps = -(-max(rows) // run.options.local_batch)
        values = np.concatenate([run.state.weights, run.state.optimizer])
        meta = run.meta(stop=run.decision.stop)
        return PeerMessage(MessageKind.START, epoch=run.state.epoch, step=steps, meta=meta, values=values)

    def _end_epoch(self, messages: list[PeerMessage]) -> PeerMessage:
        run = self._run
        if len({str(one.meta.get("digest")) for one in messages}) != 1:
            raise ServiceError("the workers' weights differ: they run on processors of different types")
        n, values = len(run.state.weights), messages[0].values
        if len(values) != n + len(run.state.optimizer):
            raise ServiceError("worker 0 did not send its weights")
        state = State(values[:n].copy(), values[n:].copy(), messages[0].epoch + 1)
        run.finish(tuple(worker_epoch(one) for one in messages), state)
        return PeerMessage(MessageKind.NEXT, meta=run.meta(stop=run.decision.stop))


def digest(values: Values) -> str:
    """Return a digest to check that workers have bitwise identical values."""
    return hashlib.sha256(values.tobytes()).hexdigest()


def _weighted_mean(messages: list[PeerMessage]) -> PeerMessage:
    """Average the workers' values weighted by their rows, in the order of the workers for reproducible sums."""
    sizes = {len(one.values) for one in messages if one.rows}
    if len(sizes) != 1:
        raise DataError("the workers sent different numbers of values" if sizes else "no worker has any image")
    total = sum(one.rows for one in messages)
    mean = np.zeros(sizes.pop(), np.float32)
    for one in messages:
        if one.rows:
            mean += one.values * np.float32(one.rows / total)
    return PeerMessage(MessageKind.REDUCED, rows=total, values=mean)


def _names(workers: Sequence[int]) -> str:
    return ("worker " if len(workers) == 1 else "workers ") + ", ".join(map(str, workers))
