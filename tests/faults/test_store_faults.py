"""Faulty stores with killed, suspended and concurrent drivers: nothing is lost or repeated."""

import os
import signal
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from random import Random
from threading import Event
from time import sleep
from typing import Any

import pytest

from streaming.jobs.maintain import maintain
from streaming.pipeline.commit import STEPS
from streaming.pipeline.decisions import Decisions
from streaming.query import query
from streaming.settings import Settings
from streaming.storage.numbered import numbered_key
from streaming.storage.store import open_store
from tests.faults.harness import check_one_attempt, rows, wait_until
from tests.faults.protocol import FENCED, Driver, Spec, begin, check
from tests.forms import Form, Record
from tests.object_store import BUCKET, ObjectStoreServer, start_object_store, stop_object_store
from tests.store_proxy import Fault, StoreProxy, at_random
from tests.streaming.history import new_topic

PER_BATCH, BATCHES = 3, 6  # messages of each partition in a micro-batch; micro-batches
PAUSE_S = 0.2  # between maintenance runs


@pytest.fixture
def proxy(object_store: ObjectStoreServer) -> Iterator[StoreProxy]:
    with StoreProxy(object_store.port) as proxy:
        yield proxy


@pytest.fixture
def spec(bucket_home: str, object_store: ObjectStoreServer, proxy: StoreProxy, tmp_path: Path) -> Spec:
    """A started stream of six micro-batches, with the proxy in front of its store."""
    settings = Settings(home=bucket_home, work=tmp_path / "work", topic=new_topic())
    begin(settings)
    return Spec(
        settings, tmp_path / "1", BATCHES * PER_BATCH, PER_BATCH, variables=object_store.environment(proxy.port)
    )


def other_host(spec: Spec, name: str) -> Spec:
    """The same stream for a driver with separate local folders."""
    log = spec.log.with_name(name)
    return replace(spec, log=log, settings=spec.settings.model_copy(update={"work": log.with_name(f"work-{name}")}))


@contextmanager
def maintained(settings: Settings) -> Iterator[None]:
    """Repeated maintenance and queries in this process."""
    ended = Event()

    def repeat() -> None:
        while not ended.wait(PAUSE_S):
            maintain(settings)
            query(settings, "SELECT count(*) FROM predictions, quarantine")

    with ThreadPoolExecutor(1) as pool:
        repeated = pool.submit(repeat)
        try:
            yield
        finally:
            ended.set()
        repeated.result()


def test_kill_at_any_step_on_a_faulty_store_loses_nothing(
    spec: Spec, proxy: StoreProxy, rng: Random, form: Form[Any], record: Record
) -> None:
    steps = form([*STEPS * 7, "decide"], [*STEPS])
    in_batches = form([1, 2], [1])  # of a run
    rng.shuffle(steps)
    spec = replace(spec, messages=PER_BATCH * (len(in_batches) * len(steps) + 2))
    proxy.faults = at_random(rng, puts=form(0.10, 0.25))
    for step in steps:
        with Driver(replace(spec, signal_at=(step, rng.choice(in_batches), signal.SIGKILL))) as driver:
            driver.wait_killed()
    with Driver(spec) as driver:
        assert driver.wait_ended() == 0, driver.log_tail()
    check(spec.settings, spec.messages)
    check_one_attempt(spec.settings)
    assert proxy.harmed.keys() >= {Fault.CUT, Fault.LOST, Fault.CONFLICT, Fault.ERROR, Fault.SLOW_DOWN}
    harmed, total = proxy.harmed.total(), len(proxy.requests)
    record("bucket: SIGKILLs, requests harmed", form("50, 10 %", "7, 25 %"), f"{len(steps)}, {harmed} of {total:,}")
    record("bucket: lost, repeated, mixed attempts", "0, 0, 0", "0, 0, 0")


def test_driver_waits_for_an_unavailable_store(spec: Spec, proxy: StoreProxy, form: Form[Any]) -> None:
    spec = replace(spec, answer_within_s=form(60.0, 0.5), messages=form(400, 40) * PER_BATCH)
    with Driver(spec) as driver:
        driver.wait_for("batch", 2)
        with proxy.away():
            driver.wait_for("away")
            sleep(form(60.0, 0.0))
        driver.wait_for("batch", 4)
        proxy.faults = lambda _: Fault.SLOW_DOWN
        driver.wait_for("away", 1 + len(driver.events("away")))
        sleep(form(60.0, 0.0))
        proxy.faults = lambda _: None
        assert driver.wait_ended() == 0, driver.log_tail()
    assert all(
        "does not answer" in event["what"] or "did not store" in event["what"] for event in driver.events("away")
    )
    check(spec.settings, spec.messages)


def test_concurrent_drivers_with_maintenance_duplicate_nothing(spec: Spec, form: Form[int], record: Record) -> None:
    starts = form(20, 1)
    for number in range(starts):
        spec = replace(spec, messages=(number + 1) * BATCHES * PER_BATCH)
        with ExitStack() as stack, maintained(spec.settings):
            both = [stack.enter_context(Driver(other_host(spec, f"{number}-{one}"))) for one in ("a", "b")]
            codes = [driver.wait_ended() for driver in both]
        assert 0 in codes, [driver.log_tail() for driver in both]
        assert set(codes) <= {0, FENCED}
    check(spec.settings, spec.messages)
    check_one_attempt(spec.settings)
    record("bucket: two drivers at once, repeated", f"{starts} starts, 0", f"{starts} starts, 0")


def test_driver_suspended_during_compaction_and_pruning_is_fenced(
    spec: Spec, form: Form[list[str]], record: Record
) -> None:
    """When it resumes, another driver has completed the batch that it had scored or decided, and the decision is gone.

    The other driver quarantines nothing, so that no transaction in that table blocks the first one.
    """
    steps = form([*STEPS[:-1]], ["score", "decide"])
    settings = spec.settings
    for number, step in enumerate(steps):
        spec = replace(spec, messages=(number + 1) * BATCHES * PER_BATCH)
        first = replace(other_host(spec, f"first-{step}"), bad_fraction=0.9, known_for_s=0.0)
        other = replace(other_host(spec, f"other-{step}"), bad_fraction=0.0)
        with Driver(replace(first, signal_at=(step, 2, signal.SIGSTOP))) as suspended:
            suspended.wait_suspended()
            with Driver(replace(other, signal_at=("batches", 3, signal.SIGKILL))) as driver:
                driver.wait_killed()
            maintain(settings)
            newest = rows(settings, "SELECT max(batch_id) AS n FROM batches")[0]["n"]
            assert Decisions(settings.place.store, settings.topic).prune(newest, keep=1, kept_for=timedelta(0)) > 0
            suspended.resume()
            assert suspended.wait_ended() == 0, suspended.log_tail()
        assert step == "begin" or suspended.events("lost"), suspended.log_tail()
        check(settings, spec.messages)
    record("bucket: drivers suspended at a step, repeated", f"{len(steps)}, 0", f"{len(steps)}, 0")


def test_decision_stored_after_its_driver_died_is_valid(spec: Spec, proxy: StoreProxy) -> None:
    settings = spec.settings
    key = numbered_key(f"streams/{settings.topic}/batches", 2, 20)
    proxy.hold(f"^PUT .*{key}")
    with Driver(spec) as killed:
        assert proxy.wait_held(60), killed.log_tail()
        killed.kill()
    second = replace(other_host(spec, "second"), signal_at=("score", 1, signal.SIGSTOP))
    with Driver(second) as driver:
        driver.wait_suspended()
        assert settings.place.store.get(key) is None
        proxy.release()
        wait_until(lambda: settings.place.store.get(key) is not None, lambda: "the late put did not arrive")
        driver.resume()
        assert driver.wait_ended() == 0, driver.log_tail()
    assert len(driver.events("lost")) == 1
    check(settings, spec.messages)
    check_one_attempt(settings)


def test_killed_and_restarted_store_loses_nothing(tmp_path: Path, form: Form[bool]) -> None:
    """Only in `make soak`, with a separate server."""
    if not form(True, False):
        pytest.skip("only with --full: it starts a separate store twice")
    home = tmp_path / "store"
    with StoreProxy(start_object_store(home).port) as proxy, pytest.MonkeyPatch.context() as patch:
        server = start_object_store(home)
        variables: Mapping[str, str] = server.environment(proxy.port)
        for name, value in variables.items():
            patch.setenv(name, value)
        settings = Settings(home=f"s3://{BUCKET}/home", work=tmp_path / "work", topic=new_topic())
        begin(settings)
        spec = Spec(settings, tmp_path / "1", 40 * PER_BATCH, PER_BATCH, variables=variables)
        try:
            with Driver(spec) as driver:
                driver.wait_for("batch", 5)
                os.kill(server.pid, signal.SIGKILL)
                driver.wait_for("away")
                stop_object_store(home)
                proxy.upstream = start_object_store(home).port
                assert driver.wait_ended() == 0, driver.log_tail()
            check(settings, spec.messages)
            assert open_store(settings.home).folders() == ["streams", "tables"]
        finally:
            stop_object_store(home)
