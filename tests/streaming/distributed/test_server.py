"""The parameter server with workers in threads: real connections, and models with two weights."""

import socket
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from streaming.distributed.history import EpochRecord
from streaming.distributed.options import Frequency, Mode, TrainerOptions
from streaming.distributed.protocol import Channel, LostPeerError, MessageKind, PeerMessage, connect
from streaming.distributed.server import ParameterServer
from streaming.distributed.training_run import Callbacks, EpochDecision, State

OPTIONS = TrainerOptions(workers=2, batch_size=4, epochs=2, timeout_s=5)
COUNTS = {"rows": 3, "loss": 1.5, "clipped_loss": 1.5, "correct": 2}
EPOCH = {"training": COUNTS, "validation": COUNTS | {"rows": 0}, "seconds": 0.1, "bytes": 10, "digest": "x"}
HOST = "127.0.0.1"


class Recorder:
    """Records the server's callbacks."""

    def __init__(self, stop_after: int = 2) -> None:
        self.records: list[EpochRecord] = []
        self.states: list[State] = []
        self.lost: list[tuple[int, int, str]] = []
        self.stop_after = stop_after

    def epoch(self, record: EpochRecord, state: State) -> EpochDecision:
        self.records.append(record)
        self.states.append(state)
        return EpochDecision(len(self.records) >= self.stop_after, 0.5)

    def callbacks(self) -> Callbacks:
        return Callbacks(self.epoch, lost=lambda *arguments: self.lost.append(arguments))


def serve(options: TrainerOptions, recorder: Recorder) -> ParameterServer:
    state = State(np.array([1, 2], np.float32), np.zeros(3, np.float32))
    return ParameterServer(options, state, EpochDecision(False, 1.0), recorder.callbacks(), HOST)


def join(server: ParameterServer, worker: int, attempt: int = 0) -> Channel:
    channel = connect(server.address, server.token, server.sizes, 10)
    channel.send(PeerMessage(MessageKind.HELLO, worker, meta={"attempt": attempt}))
    return channel


def ask(channel: Channel, message: PeerMessage) -> PeerMessage:
    channel.send(message)
    while (answer := channel.receive()).kind is MessageKind.PROGRESS:
        pass
    return answer


def together(*work: Callable[[], Any]) -> list[Any]:
    """Run functions concurrently; returns the result of each, or the LostPeerError that it raised."""
    found: list[Any] = [None] * len(work)

    def run(at: int) -> None:
        try:
            found[at] = work[at]()
        except LostPeerError as error:
            found[at] = error

    threads = [threading.Thread(target=run, args=(at,)) for at in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    return found


def test_synchronous_workers_get_the_mean_weighted_by_rows() -> None:
    recorder = Recorder()
    with serve(OPTIONS, recorder) as server:

        def work(
            worker: int, rows: int, value: float
        ) -> Callable[[], tuple[PeerMessage, PeerMessage, list[PeerMessage]]]:
            def run() -> tuple[PeerMessage, PeerMessage, list[PeerMessage]]:
                channel = join(server, worker)
                start = ask(channel, PeerMessage(MessageKind.READY, worker, rows=rows))
                gradient = np.full(2, value, np.float32)
                mean = ask(channel, PeerMessage(MessageKind.REDUCE, worker, 0, 0, rows, values=gradient))
                state = np.arange(5, dtype=np.float32) if worker == 0 else np.empty(0, np.float32)
                ends = [
                    ask(channel, PeerMessage(MessageKind.EPOCH, worker, epoch, rows=rows, meta=EPOCH, values=state))
                    for epoch in (0, 1)
                ]
                return start, mean, ends

            return run

        found = together(work(0, 1, 4.0), work(1, 5, 1.0))
    for start, mean, ends in found:
        assert (start.step, start.values.tolist()) == (3, [1, 2, 0, 0, 0])  # 5 rows, 2 at a time
        assert mean.values == pytest.approx([1.5, 1.5])
        assert [one.meta["stop"] for one in ends] == [False, True]
        assert ends[0].meta["learning_rate"] == 0.5
    assert [record.training.rows for record in recorder.records] == [6, 6]
    assert server.run.state.weights.tolist() == [0, 1]
    assert server.run.state.epoch == 2
    assert not recorder.lost


def test_lost_worker_is_reported_to_the_others_and_all_may_reconnect() -> None:
    recorder = Recorder()
    with serve(OPTIONS, recorder) as server:

        def leave() -> None:
            channel = join(server, 1)
            ask(channel, PeerMessage(MessageKind.READY, 1, rows=3))
            channel.close()

        def stay() -> PeerMessage:
            channel = join(server, 0)
            ask(channel, PeerMessage(MessageKind.READY, 0, rows=3))
            return ask(channel, PeerMessage(MessageKind.REDUCE, 0, 0, 0, 3, values=np.ones(2, np.float32)))

        _, answer = together(leave, stay)
        assert answer.kind is MessageKind.FAILED
        assert answer.meta["why"] == "worker 1: the connection was closed"
        assert recorder.lost == [(1, 0, "the connection was closed")]
        again = [join(server, worker, attempt=1) for worker in (0, 1)]
        starts = together(
            *(lambda at=at: ask(again[at], PeerMessage(MessageKind.READY, at, rows=3)) for at in (0, 1))  # type: ignore[misc]
        )
        assert [start.kind for start in starts] == [MessageKind.START, MessageKind.START]


def test_silent_worker_is_named() -> None:
    recorder = Recorder()
    with serve(replace(OPTIONS, timeout_s=1), recorder) as server:
        silent = join(server, 1)
        channel = join(server, 0)
        answer = ask(channel, PeerMessage(MessageKind.READY, 0, rows=3))
        silent.close()
    assert answer.kind is MessageKind.FAILED
    assert answer.meta["why"] == "worker 1: no message for 1 s"


def test_worker_that_never_connects_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streaming.distributed.barrier.KEEP_ALIVE_S", 0.5)
    with serve(replace(OPTIONS, timeout_s=1), Recorder()) as server:
        answer = ask(join(server, 0), PeerMessage(MessageKind.READY, 0, rows=3))
    assert answer.kind is MessageKind.FAILED
    assert answer.meta["why"] == "worker 1 did not connect within 1 s"


@pytest.mark.parametrize("mode", [Mode.ASYNCHRONOUS, Mode.HOGWILD])
def test_asynchronous_push_is_weighted_by_the_workers_share(mode: Mode) -> None:
    recorder = Recorder()
    with serve(replace(OPTIONS, mode=mode, frequency=Frequency.EPOCH), recorder) as server:
        one, other = join(server, 0), join(server, 1)
        start = ask(one, PeerMessage(MessageKind.READY, 0, rows=2))
        assert ask(other, PeerMessage(MessageKind.READY, 1, rows=4)).version == start.version == 0
        pushed = ask(one, PeerMessage(MessageKind.PUSH, 0, rows=2, version=0, values=np.array([3, 0], np.float32)))
        assert pushed.values == pytest.approx([2, 2])
        last = ask(other, PeerMessage(MessageKind.PUSH, 1, rows=4, version=0, values=np.array([0, 3], np.float32)))
        assert (last.values.tolist(), last.version) == ([2, 4], 2)
        optimizer = np.ones(3, np.float32)
        assert not ask(one, PeerMessage(MessageKind.EPOCH, 0, 0, meta=EPOCH, values=optimizer)).meta["stop"]
        assert not recorder.records  # the other worker has not finished the epoch
        assert not ask(other, PeerMessage(MessageKind.EPOCH, 1, 0, meta=EPOCH, values=3 * optimizer)).meta["stop"]
    assert [record.epoch for record in recorder.records] == [0]
    assert recorder.states[0].weights.tolist() == [2, 4]
    assert recorder.states[0].optimizer.tolist() == [2, 2, 2]
    assert {worker: dict(late) for worker, late in server.mode.staleness.items()} == {0: {0: 1}, 1: {1: 1}}


@pytest.mark.parametrize("mode", [Mode.ASYNCHRONOUS, Mode.HOGWILD])
def test_reconnecting_asynchronous_worker_continues_where_it_was(mode: Mode) -> None:
    with serve(replace(OPTIONS, mode=mode), Recorder()) as server:
        first = join(server, 0)
        ask(first, PeerMessage(MessageKind.READY, 0, rows=2))
        ask(first, PeerMessage(MessageKind.EPOCH, 0, 0, meta=EPOCH, values=np.array([7, 8, 9], np.float32)))
        first.close()
        again = ask(join(server, 0, attempt=1), PeerMessage(MessageKind.READY, 0, rows=2))
    assert again.epoch == 1
    assert again.values.tolist() == [1, 2, 7, 8, 9]


def test_differing_weights_end_the_training() -> None:
    recorder = Recorder()
    with serve(OPTIONS, recorder) as server:

        def work(worker: int) -> PeerMessage:
            channel = join(server, worker)
            ask(channel, PeerMessage(MessageKind.READY, worker, rows=3))
            meta = EPOCH | {"digest": str(worker)}
            return ask(
                channel, PeerMessage(MessageKind.EPOCH, worker, 0, rows=3, meta=meta, values=np.zeros(5, np.float32))
            )

        answers = together(lambda: work(0), lambda: work(1))
        assert [answer.kind for answer in answers] == [MessageKind.FAILED, MessageKind.FAILED]
        assert "weights differ" in str(server.run.error)


@pytest.mark.parametrize(
    "meta", [{}, EPOCH | {"training": 3}, EPOCH | {"validation": {"rows": "many"}, "training": {"sql": 1}}]
)
def test_invalid_epoch_report_fails_only_that_attempt(meta: dict[str, Any]) -> None:
    recorder = Recorder()
    with serve(replace(OPTIONS, mode=Mode.ASYNCHRONOUS), recorder) as server:
        channel = join(server, 0)
        ask(channel, PeerMessage(MessageKind.READY, 0, rows=2))
        answer = ask(channel, PeerMessage(MessageKind.EPOCH, 0, 0, meta=meta, values=np.zeros(3, np.float32)))
        assert answer.kind is MessageKind.FAILED
        assert server.run.error is None
    assert len(recorder.lost) == 1


def test_peer_without_the_token_gets_no_answer() -> None:
    with serve(OPTIONS, Recorder()) as server, socket.create_connection(server.address, 5) as client:
        client.recv(64)  # its nonce
        client.sendall(b"x" * 64)
        assert client.recv(64) == b""
    with serve(OPTIONS, Recorder()) as server, pytest.raises(LostPeerError):
        connect(server.address, b"another token", server.sizes, 5)
