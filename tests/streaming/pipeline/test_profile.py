"""The profile of micro-batches: the time per stage adds up to the wall time."""

import pytest

from streaming.pipeline.commit import BatchResult
from streaming.pipeline.profile import Profiler


def batch(batch_id: int, **seconds: float) -> BatchResult:
    """A micro-batch of 100 images on two cores."""
    return BatchResult(batch_id, 1, 100, 2_400_000, 100, {}, seconds, cores=2)


STEADY = {
    "decode": 0.4, "backbone": 3.0, "plan": 0.1, "score": 1.8, "commit": 0.1, "batch": 2.0, "between": 0.5,
}  # fmt: skip


def test_first_batch_is_excluded_from_the_total() -> None:
    profiler = Profiler()
    profiler.add(batch(0, load=9.0, backbone=3.0, plan=0.1, score=12.0, commit=0.1, batch=12.2, between=0.0))
    assert profiler.total.images == 0
    profiler.add(batch(1, **STEADY))
    assert (profiler.total.images, profiler.total.wall_s) == (100, 2.5)
    assert "load" not in profiler.total.core_s


def test_worker_seconds_count_once_and_driver_seconds_on_every_core() -> None:
    profiler = Profiler()
    profiler.add(batch(0, **STEADY))
    profiler.add(batch(1, **STEADY))
    spent = {one.stage: one.seconds for one in profiler.total.shares()}
    assert spent["backbone"] == 3.0
    assert (spent["plan"], spent["commit"], spent["between"]) == (0.2, 0.2, 1.0)
    assert spent["Spark and idle cores"] == pytest.approx(5.0 - 3.4 - 1.4)
    assert sum(one.share for one in profiler.total.shares()) == pytest.approx(1.0)
    assert profiler.total.measured == pytest.approx(4.8 / 5.0)


def test_batch_profile_is_one_line_in_pipeline_order() -> None:
    line = Profiler().add(batch(7, **STEADY))
    assert line == (
        "profile of batch 7: 100 images in 2.50 s on 2 cores: decode 8.0%, backbone 60.0%, plan 4.0%, commit 4.0%, "
        "between 20.0%, Spark and idle cores 4.0%"
    )
