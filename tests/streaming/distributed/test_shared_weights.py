"""The asynchronous modes' weights: what many writers do to them."""

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


def test_nothing_is_lost_under_the_lock() -> None:
    weights = SharedWeights(np.zeros(SIZE, np.float32), locked=True)
    write(weights)
    found, version = weights.read()
    assert (found == WRITERS * TIMES).all()
    assert version == WRITERS * TIMES
    lost = weights.lost()
    assert (lost.values, lost.share, lost.overlapping) == (0, 0.0, 0)


def test_what_racing_writers_lose_is_counted() -> None:
    """Whatever they lose: how much depends on the machine, that it is told does not."""
    weights = SharedWeights(np.zeros(SIZE, np.float32), locked=False)
    write(weights)
    found, _ = weights.read()
    missing = WRITERS * TIMES - found
    lost = weights.lost()
    assert lost.values == (missing > 0).sum()
    assert lost.share == pytest.approx(missing.sum() / (WRITERS * TIMES * SIZE))
    assert lost.overlapping > 0


def test_staleness_is_the_number_of_changes_since_the_read() -> None:
    weights = SharedWeights(np.zeros(3, np.float32), locked=True)
    _, first = weights.read()
    for worker in (0, 1, 2):
        weights.add(worker, np.ones(3, np.float32), first)
    assert [dict(weights.staleness[worker]) for worker in (0, 1, 2)] == [{0: 1}, {1: 1}, {2: 1}]


def test_a_reader_has_a_copy() -> None:
    weights = SharedWeights(np.zeros(3, np.float32), locked=True)
    copy, version = weights.read()
    weights.add(0, np.ones(3, np.float32), version)
    assert copy.tolist() == [0, 0, 0]
