"""The synchronous mode: all workers meet, at every step or after every epoch, and go on with the same weights."""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from streaming.distributed.course import Course, State, out_of_turn, worker_epoch
from streaming.distributed.protocol import Channel, Kind, Message, Values
from streaming.distributed.rendezvous import BrokenError, Rendezvous
from streaming.distributed.shared_weights import Lost
from streaming.errors import DataError, ServiceError


@dataclass
class _Meeting:
    """The workers of one try."""

    rendezvous: Rendezvous[Message, Message]
    attempts: dict[int, int] = field(default_factory=dict)
    started: bool = False


class Synchronous:
    """Puts together what the workers bring: gradients at every step, or weights and optimizer state."""

    def __init__(self, course: Course) -> None:
        self._course = course
        self._meeting = self._new_meeting()

    @property
    def staleness(self) -> dict[int, Counter[int]]:
        """None: nobody changes the weights between a worker's read and its step."""
        return {}

    def lost(self) -> Lost:
        """Nothing: all have the same weights."""
        return Lost()

    def final_state(self) -> State:
        return self._course.state

    def talk(self, channel: Channel, worker: int, attempt: int) -> None:
        """Serve one worker to its end.

        Raises:
            LostPeerError: it is gone or makes no sense.
            BrokenError: another one is, or this try is no longer wanted.
            ServiceError: the training cannot go on.
        """
        course = self._course
        meeting = self._join(worker, attempt)

        def waiting(waited: float, missing: list[int]) -> None:
            channel.send(Message(Kind.PROGRESS))
            absent = [one for one in missing if one not in meeting.attempts]
            if absent and waited > course.options.timeout_s:
                raise BrokenError(f"{_names(absent)} did not connect within {course.options.timeout_s:.0f} s")

        def meet(message: Message, combine: Callable[[list[Message]], Message]) -> Message:
            return meeting.rendezvous.meet(worker, message, combine, waiting)

        ready = course.until_ready(channel, worker)
        start = meet(ready, lambda all_of_them: self._start(meeting, all_of_them))
        channel.send(start)
        stop = bool(start.meta["stop"])
        while not stop:
            message = channel.receive()
            match message.kind:
                case Kind.PROGRESS:
                    course.note(worker, message)
                case Kind.REDUCE:
                    channel.send(meet(message, _weighted_mean))
                case Kind.EPOCH:
                    answer = meet(message, self._end_epoch)
                    channel.send(answer)
                    stop = bool(answer.meta["stop"])
                case _:
                    raise out_of_turn(message)

    def give_up(self, worker: int, attempt: int, why: str) -> bool:
        """Let the others know that a worker is gone; False if another try has its place already."""
        with self._course.lock:
            if self._meeting.attempts.get(worker) != attempt:
                return False
            self._meeting.rendezvous.break_off(f"worker {worker}: {why}")
            return True

    def break_off(self, why: str) -> None:
        """End the wait of all workers."""
        self._meeting.rendezvous.break_off(why)

    def _new_meeting(self) -> _Meeting:
        return _Meeting(Rendezvous(self._course.options.workers))

    def _join(self, worker: int, attempt: int) -> _Meeting:
        with self._course.lock:
            self._course.check()
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
        course = self._course
        with course.lock:
            meeting.started = True
            course.start_clock()
        rows = [one.rows for one in ready]
        if not sum(rows):
            raise DataError("no worker has an image that decodes to train on")
        steps = -(-max(rows) // course.options.local_batch)
        values = np.concatenate([course.state.weights, course.state.optimizer])
        meta = course.meta(stop=course.answer.stop)
        return Message(Kind.START, epoch=course.state.epoch, step=steps, meta=meta, values=values)

    def _end_epoch(self, messages: list[Message]) -> Message:
        course = self._course
        if len({str(one.meta.get("digest")) for one in messages}) != 1:
            raise ServiceError("the workers' weights are no longer the same: they run on processors that differ")
        n, values = len(course.state.weights), messages[0].values
        if len(values) != n + len(course.state.optimizer):
            raise ServiceError("worker 0 did not send its weights")
        state = State(values[:n].copy(), values[n:].copy(), messages[0].epoch + 1)
        course.finish(tuple(worker_epoch(one) for one in messages), state)
        return Message(Kind.NEXT, meta=course.meta(stop=course.answer.stop))


def digest(values: Values) -> str:
    """Tells whether two workers have the same numbers, to the last bit."""
    return hashlib.sha256(values.tobytes()).hexdigest()


def _weighted_mean(messages: list[Message]) -> Message:
    """The mean of the workers' values by their rows, added up in the workers' order, so that the same values give the
    same sum."""
    sizes = {len(one.values) for one in messages if one.rows}
    if len(sizes) != 1:
        raise DataError("the workers brought different numbers of values" if sizes else "no worker has any image")
    total = sum(one.rows for one in messages)
    mean = np.zeros(sizes.pop(), np.float32)
    for one in messages:
        if one.rows:
            mean += one.values * np.float32(one.rows / total)
    return Message(Kind.REDUCED, rows=total, values=mean)


def _names(workers: Sequence[int]) -> str:
    return ("worker " if len(workers) == 1 else "workers ") + ", ".join(map(str, workers))
