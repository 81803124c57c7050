"""The weights of the asynchronous modes under concurrent writers."""

import threading

import numpy as np
import pytest

from streaming.distributed.shared_weights import SharedWeights

WRITERS, TIMES, SIZE = 4, 20, 3_000_000


def write(weights: SharedWeights) -> None:
    ready = threading.Barrier(WRITERS)

    def run(worker: int) -> None:
        ready.wait()
        for _ in range(TIMES):
            _, version = weights.read()
            weights.add(worker, np.ones(SIZE, np.float32), version)

    threads = [threading.Thread(target=run, args=(worker,)) for worker in range(WRITERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_no_update_is_lost_with_the_lock() -> None:
    weights = SharedWeights(np.zeros(SIZE, np.float32), locked=True)
    write(weights)
    found, version = weights.read()
    assert (found == WRITERS * TIMES).all()
    assert version == WRITERS * TIMES
    lost = weights.lost()
    assert (lost.values, lost.share, lost.overlapping) == (0, 0.0, 0)


def test_updates_lost_by_racing_writers_are_counted() -> None:
    """How many updates are lost depends on the machine; that they are counted does not."""
    weights = SharedWeights(np.zeros(SIZE, np.float32), locked=False)
    write(weights)
    found, _ = weights.read()
    missing = WRITERS * TIMES - found
    lost = weights.lost()
    assert lost.values == (missing > 0).sum()
    assert lost.share == pytest.approx(missing.sum() / (WRITERS * TIMES * SIZE))
    assert lost.overlapping > 0


def test_staleness_is_the_number_of_updates_since_the_read() -> None:
    weights = SharedWeights(np.zeros(3, np.float32), locked=True)
    _, first = weights.read()
    for worker in (0, 1, 2):
        weights.add(worker, np.ones(3, np.float32), first)
    assert [dict(weights.staleness[worker]) for worker in (0, 1, 2)] == [{0: 1}, {1: 1}, {2: 1}]


def test_read_returns_a_copy() -> None:
    weights = SharedWeights(np.zeros(3, np.float32), locked=True)
    copy, version = weights.read()
    weights.add(0, np.ones(3, np.float32), version)
    assert copy.tolist() == [0, 0, 0]
