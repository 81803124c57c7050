"""The weight of a worker's update in the asynchronous modes: its share of the images that decode."""

import numpy as np
import pytest

from streaming.distributed.options import Mode, TrainerOptions
from streaming.distributed.protocol import Channel, MessageKind, PeerMessage
from tests.streaming.distributed.test_server import Recorder, ask, join, serve

ASYNCHRONOUS = [Mode.ASYNCHRONOUS, Mode.HOGWILD]


def options(mode: Mode, workers: int) -> TrainerOptions:
    return TrainerOptions(mode=mode, workers=workers, batch_size=4, epochs=2, timeout_s=5)


def push(channel: Channel, worker: int) -> np.ndarray:
    """The server's weights after an update of 12 to both of them."""
    return ask(channel, PeerMessage(MessageKind.PUSH, worker, values=np.full(2, 12, np.float32))).values


@pytest.mark.parametrize("mode", ASYNCHRONOUS)
def test_undecodable_images_do_not_reduce_the_step(mode: Mode) -> None:
    """Of the six images of each of two workers, two and four decode: the shares are 1/3 and 2/3."""
    with serve(options(mode, 2), Recorder()) as server:
        channels = [join(server, worker) for worker in (0, 1)]
        for worker, rows in enumerate((2, 4)):
            bad = {"n_bad": 6 - rows}
            ask(channels[worker], PeerMessage(MessageKind.READY, worker, rows=rows, meta=bad))
        assert push(channels[0], 0) == pytest.approx([1 + 4, 2 + 4])
        assert push(channels[1], 1) == pytest.approx([1 + 12, 2 + 12])


@pytest.mark.parametrize("mode", ASYNCHRONOUS)
def test_workers_not_ready_yet_are_assumed_to_have_average_shares(mode: Mode) -> None:
    with serve(options(mode, 3), Recorder()) as server:
        channels = [join(server, worker) for worker in (0, 1)]
        ask(channels[0], PeerMessage(MessageKind.READY, 0, rows=2))
        assert push(channels[0], 0) == pytest.approx([1 + 4, 2 + 4])  # a third
        ask(channels[1], PeerMessage(MessageKind.READY, 1, rows=6))
        assert push(channels[0], 0) == pytest.approx([1 + 6, 2 + 6])  # 2 of an expected 12


@pytest.mark.parametrize("mode", ASYNCHRONOUS)
def test_worker_without_decodable_images_changes_nothing(mode: Mode) -> None:
    with serve(options(mode, 2), Recorder()) as server:
        channel = join(server, 0)
        ask(channel, PeerMessage(MessageKind.READY, 0, rows=0))
        assert push(channel, 0) == pytest.approx([1, 2])
