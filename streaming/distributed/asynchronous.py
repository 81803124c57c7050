"""The asynchronous modes: every worker changes the server's weights when it is ready, and waits for nobody."""

from collections import Counter

import numpy as np

from streaming.distributed.barrier import BrokenError
from streaming.distributed.history import WorkerEpoch
from streaming.distributed.options import Mode
from streaming.distributed.protocol import Channel, Kind, LostPeerError, Message, Values
from streaming.distributed.shared_weights import Lost, SharedWeights
from streaming.distributed.training_run import Course, State, out_of_turn, worker_epoch


class Asynchronous:
    """Holds the weights that all workers read and add to, and each worker's optimizer state after its epochs."""

    def __init__(self, course: Course) -> None:
        self._course = course
        self._rows: dict[int, int] = {}  # images that each worker has decoded
        self._shared = SharedWeights(course.state.weights.copy(), locked=course.options.mode is not Mode.HOGWILD)
        self._optimizer: dict[int, Values] = {}
        self._done = dict.fromkeys(range(course.options.workers), course.state.epoch)
        self._attempts: dict[int, int] = {}
        self._epochs: dict[int, dict[int, WorkerEpoch]] = {}

    @property
    def staleness(self) -> dict[int, Counter[int]]:
        """Of each worker: changes by others between a read and its push → how often."""
        return self._shared.staleness

    def lost(self) -> Lost:
        """What racing writers lost."""
        return self._shared.lost()

    def final_state(self) -> State:
        """With all pushes, also of workers that went on after the last common epoch."""
        return State(self._shared.read()[0], self._course.state.optimizer, self._course.state.epoch)

    def talk(self, channel: Channel, worker: int, attempt: int) -> None:
        """Serve one worker to its end.

        Raises:
            LostPeerError: it is gone or makes no sense.
            BrokenError: this try is no longer wanted.
        """
        course = self._course
        self._join(worker, attempt)
        ready = course.until_ready(channel, worker)
        with course.lock:
            self._rows[worker] = ready.rows
        start = self._start(worker)
        channel.send(start)
        stop = bool(start.meta["stop"])
        while not stop:
            message = channel.receive()
            if self._attempts[worker] != attempt:
                raise BrokenError("a later try has this worker's place")
            match message.kind:
                case Kind.PROGRESS:
                    course.note(worker, message)
                case Kind.PUSH:
                    self._shared.add(worker, message.values * self._share(worker), message.version)
                    weights, version = self._shared.read()
                    channel.send(Message(Kind.WEIGHTS, worker, version=version, values=weights))
                case Kind.EPOCH:
                    answer = self._end_epoch(worker, message)
                    channel.send(answer)
                    stop = bool(answer.meta["stop"])
                case _:
                    raise out_of_turn(message)

    def give_up(self, worker: int, attempt: int, why: str) -> bool:  # noqa: ARG002  the others do not care
        """A worker is gone; False if another try has its place already."""
        return self._attempts.get(worker) == attempt

    def break_off(self, why: str) -> None:
        """Nobody waits."""

    def _join(self, worker: int, attempt: int) -> None:
        with self._course.lock:
            self._course.check()
            if self._attempts.get(worker, -1) > attempt:
                raise BrokenError("a later try has this worker's place")
            self._attempts[worker] = attempt

    def _share(self, worker: int) -> np.float32:
        """This worker's share of the images, by which its change counts, so that all workers make up one step.

        Only images that decode count, and only the worker that has read an image can say so. All workers are dealt the
        same number of images; one that has not read its own yet is assumed to have as many as the others on average.
        """
        with self._course.lock:
            mean = sum(self._rows.values()) / len(self._rows)
            return np.float32(self._rows[worker] / max(1.0, mean * self._course.options.workers))

    def _start(self, worker: int) -> Message:
        """The weights as they are, and the worker's own optimizer state: it goes on where its last try was."""
        course = self._course
        with course.lock:
            course.start_clock()
            epoch = self._done[worker]
            weights, version = self._shared.read()
            values = np.concatenate([weights, self._optimizer.get(worker, course.state.optimizer)])
            meta = course.meta(stop=course.answer.stop or epoch >= course.options.epochs)
        return Message(Kind.START, worker, epoch, version=version, meta=meta, values=values)

    def _end_epoch(self, worker: int, message: Message) -> Message:
        course = self._course
        if len(message.values) != len(course.state.optimizer):
            raise LostPeerError("did not send its optimizer's state")
        told = worker_epoch(message)
        with course.lock:
            epoch = self._done[worker]
            self._optimizer[worker] = message.values
            self._done[worker] += 1
            of_all = self._epochs.setdefault(epoch, {})
            of_all[worker] = told
            if len(of_all) == course.options.workers:
                workers = tuple(of_all[one] for one in sorted(of_all))
                mean = np.array(np.mean(list(self._optimizer.values()), axis=0), np.float32)
                course.finish(workers, State(self._shared.read()[0], mean, epoch + 1))
            # A worker that is ahead of the others goes on; whether all shall stop is known when the last one is here.
            stop = course.answer.stop or self._done[worker] >= course.options.epochs
            return Message(Kind.NEXT, worker, meta=course.meta(stop=stop))
