"""The asynchronous modes: each worker updates the server's weights as soon as it is ready."""

from collections import Counter

import numpy as np

from streaming.distributed.barrier import BrokenError
from streaming.distributed.history import WorkerEpoch
from streaming.distributed.options import Mode
from streaming.distributed.protocol import Channel, LostPeerError, MessageKind, PeerMessage, Values
from streaming.distributed.shared_weights import Lost, SharedWeights
from streaming.distributed.training_run import State, TrainingRun, out_of_turn, worker_epoch


class Asynchronous:
    """The shared weights, and each worker's optimizer state after its last epoch."""

    def __init__(self, run: TrainingRun) -> None:
        self._run = run
        self._rows: dict[int, int] = {}  # number of decoded images per worker
        self._shared = SharedWeights(run.state.weights.copy(), locked=run.options.mode is not Mode.HOGWILD)
        self._optimizer: dict[int, Values] = {}
        self._done = dict.fromkeys(range(run.options.workers), run.state.epoch)
        self._attempts: dict[int, int] = {}
        self._epochs: dict[int, dict[int, WorkerEpoch]] = {}

    @property
    def staleness(self) -> dict[int, Counter[int]]:
        """Per worker: number of updates by others between a read and its push → count."""
        return self._shared.staleness

    def lost(self) -> Lost:
        """Return the updates lost by races between writers."""
        return self._shared.lost()

    def final_state(self) -> State:
        """Return the state with all pushes, including those after the last common epoch."""
        return State(self._shared.read()[0], self._run.state.optimizer, self._run.state.epoch)

    def serve(self, channel: Channel, worker: int, attempt: int) -> None:
        """Serve a worker's task attempt until it ends.

        Raises:
            LostPeerError: the worker is lost or violates the protocol.
            BrokenError: the attempt has been superseded.
        """
        run = self._run
        self._join(worker, attempt)
        ready = run.until_ready(channel, worker)
        with run.lock:
            self._rows[worker] = ready.rows
        start = self._start(worker)
        channel.send(start)
        stop = bool(start.meta["stop"])
        while not stop:
            message = channel.receive()
            if self._attempts[worker] != attempt:
                raise BrokenError("a later attempt has replaced this worker")
            match message.kind:
                case MessageKind.PROGRESS:
                    run.report_progress(worker, message)
                case MessageKind.PUSH:
                    self._shared.add(worker, message.values * self._share(worker), message.version)
                    weights, version = self._shared.read()
                    channel.send(PeerMessage(MessageKind.WEIGHTS, worker, version=version, values=weights))
                case MessageKind.EPOCH:
                    reply = self._end_epoch(worker, message)
                    channel.send(reply)
                    stop = bool(reply.meta["stop"])
                case _:
                    raise out_of_turn(message)

    def drop_worker(self, worker: int, attempt: int, why: str) -> bool:  # noqa: ARG002  other workers are not affected
        """Handle the loss of a worker; return False if another attempt has already replaced it."""
        return self._attempts.get(worker) == attempt

    def abort(self, why: str) -> None:
        """Do nothing: no worker waits."""

    def _join(self, worker: int, attempt: int) -> None:
        with self._run.lock:
            self._run.check()
            if self._attempts.get(worker, -1) > attempt:
                raise BrokenError("a later attempt has replaced this worker")
            self._attempts[worker] = attempt

    def _share(self, worker: int) -> np.float32:
        """Return the worker's share of the images, which weights its updates so that all workers add up to one step.

        Only decoded images count, which are known after a worker has read its images. A worker that has not is assumed
        to have the average number.
        """
        with self._run.lock:
            mean = sum(self._rows.values()) / len(self._rows)
            return np.float32(self._rows[worker] / max(1.0, mean * self._run.options.workers))

    def _start(self, worker: int) -> PeerMessage:
        """Return the current weights and the worker's own optimizer state, so that it continues its last attempt."""
        run = self._run
        with run.lock:
            run.start_clock()
            epoch = self._done[worker]
            weights, version = self._shared.read()
            values = np.concatenate([weights, self._optimizer.get(worker, run.state.optimizer)])
            meta = run.meta(stop=run.decision.stop or epoch >= run.options.epochs)
        return PeerMessage(MessageKind.START, worker, epoch, version=version, meta=meta, values=values)

    def _end_epoch(self, worker: int, message: PeerMessage) -> PeerMessage:
        run = self._run
        if len(message.values) != len(run.state.optimizer):
            raise LostPeerError("did not send its optimizer state")
        finished = worker_epoch(message)
        with run.lock:
            epoch = self._done[worker]
            self._optimizer[worker] = message.values
            self._done[worker] += 1
            of_all = self._epochs.setdefault(epoch, {})
            of_all[worker] = finished
            if len(of_all) == run.options.workers:
                workers = tuple(of_all[one] for one in sorted(of_all))
                mean = np.array(np.mean(list(self._optimizer.values()), axis=0), np.float32)
                run.finish(workers, State(self._shared.read()[0], mean, epoch + 1))
            # A worker that is ahead continues; whether all stop is decided when the last one finishes.
            stop = run.decision.stop or self._done[worker] >= run.options.epochs
            return PeerMessage(MessageKind.NEXT, worker, meta=run.meta(stop=stop))
