"""Killed, suspended and concurrent drivers: a `read_committed` consumer of the answers finds each row exactly once."""

import signal
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any
from uuid import uuid4

import pytest

from streaming.jobs.maintain import maintain
from streaming.platform.broker import start_broker, stop_broker
from streaming.settings import Settings
from tests.faults.harness import committed_answers, rows
from tests.faults.protocol import FENCED, Driver, Spec, begin, check
from tests.forms import Form, Record
from tests.streaming.history import new_topic

PER_BATCH, BATCHES = 3, 6  # messages of each partition in a micro-batch; micro-batches
# A step of a micro-batch, and which of answers and tables must be complete before the other begins.
KILLS = (
    ("score", None),
    ("decide", None),
    ("send", None),
    ("send", "tables"),
    ("features", "tables"),
    ("answers", "answers"),
    ("batches", None),
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """With --full, also run on a bucket."""
    if "place" in metafunc.fixturenames:
        metafunc.parametrize("place", ["local", "bucket"] if metafunc.config.getoption("full") else ["local"])


@pytest.fixture
def spec(place: str, broker: Settings, request: pytest.FixtureRequest, tmp_path: Path) -> Spec:
    """A started stream of six micro-batches with a new answers topic."""
    home = tmp_path / "home" if place == "local" else request.getfixturevalue("bucket_home")
    settings = Settings(
        home=home,
        work=tmp_path / "work",
        topic=new_topic(),
        answers_topic=f"answers-{uuid4().hex[:8]}",
        answers="both",
        answers_bootstrap_servers=broker.bootstrap_servers,
    )
    begin(settings)
    variables = {} if place == "local" else request.getfixturevalue("object_store").environment()
    return Spec(settings, tmp_path / "1", BATCHES * PER_BATCH, PER_BATCH, variables=variables)


def with_log(spec: Spec, name: str) -> Spec:
    return replace(spec, log=spec.log.with_name(name))


def test_kill_at_any_step_leaves_each_answer_once(
    place: str, spec: Spec, rng: Random, form: Form[Any], record: Record
) -> None:
    kills = form([*KILLS * 7, KILLS[-2]], [*KILLS])
    in_batches = form([1, 2], [1])  # of a run
    rng.shuffle(kills)
    spec = replace(spec, messages=PER_BATCH * (len(in_batches) * len(kills) + 2))
    for step, first in kills:
        with Driver(replace(spec, first=first, signal_at=(step, rng.choice(in_batches), signal.SIGKILL))) as driver:
            driver.wait_killed()
    with Driver(spec) as driver:
        assert driver.wait_ended() == 0, driver.log_tail()
    check(spec.settings, spec.messages)
    assert len(committed_answers(spec.settings)) == 2 * spec.messages
    record(f"answers, {place}: SIGKILLs; lost, repeated", form("50; 0, 0", "7; 0, 0"), f"{len(kills)}; 0, 0")


def test_driver_suspended_in_a_transaction_is_fenced(spec: Spec) -> None:
    """Suspended between sending and committing; `maintain` finishes its batch, and another driver the later ones."""
    with Driver(replace(spec, signal_at=("send", 2, signal.SIGSTOP))) as suspended:
        suspended.wait_suspended()
        maintain(spec.settings)
        assert rows(spec.settings, "SELECT max(batch_id) AS n FROM batches")[0]["n"] == 2
        with Driver(with_log(spec, "other")) as driver:
            assert driver.wait_ended() == 0, driver.log_tail()
        suspended.resume()
        assert suspended.wait_ended() == 0, suspended.log_tail()
        assert suspended.events("lost"), suspended.log_tail()
    check(spec.settings, spec.messages)


def test_concurrent_drivers_duplicate_no_answer(spec: Spec, form: Form[int], record: Record) -> None:
    starts = form(20, 1)
    for number in range(starts):
        spec = replace(spec, messages=(number + 1) * BATCHES * PER_BATCH)
        with Driver(with_log(spec, f"a{number}")) as one, Driver(with_log(spec, f"b{number}")) as other:
            codes = {one.wait_ended(), other.wait_ended()}
        assert 0 in codes, (one.log_tail(), other.log_tail())
        assert codes <= {0, FENCED}
    check(spec.settings, spec.messages)
    record("answers: two drivers at once, repeated", f"{starts} starts, 0", f"{starts} starts, 0")


def test_tables_are_at_most_one_batch_ahead_of_unavailable_answers(spec: Spec, fragile_broker: Settings) -> None:
    settings = spec.settings.model_copy(update={"answers_bootstrap_servers": fragile_broker.bootstrap_servers})
    spec = replace(spec, settings=settings, messages=20 * PER_BATCH)
    with Driver(spec) as driver:
        driver.wait_for("batch", 2)
        stop_broker(fragile_broker)
        try:
            driver.wait_for("away")
            complete = rows(settings, "SELECT max(batch_id) AS n FROM batches")[0]["n"]
            ahead = rows(settings, "SELECT max(batch_id) AS n FROM predictions")[0]["n"]
            assert complete <= ahead <= complete + 1 < 20
        finally:
            start_broker(fragile_broker)
        assert driver.wait_ended() == 0, driver.log_tail()
    check(settings, spec.messages)
