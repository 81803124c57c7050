"""A home in a bucket whose store fails, and drivers that die, sleep and race there: nothing is lost or repeated."""

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

PER_BATCH = 3  # messages of each partition


@pytest.fixture
def proxy(object_store: ObjectStoreServer) -> Iterator[StoreProxy]:
    with StoreProxy(object_store.port) as proxy:
        yield proxy


@pytest.fixture
def spec(bucket_home: str, object_store: ObjectStoreServer, proxy: StoreProxy, tmp_path: Path) -> Spec:
    """A stream that has begun, of ten micro-batches, with the proxy before its store."""
    settings = Settings(home=bucket_home, work=tmp_path / "work", topic=new_topic())
    begin(settings)
    return Spec(settings, tmp_path / "1", 10 * PER_BATCH, PER_BATCH, variables=object_store.environment(proxy.port))


def other_host(spec: Spec, name: str) -> Spec:
    """The same stream for a driver that shares no folder with the first."""
    log = spec.log.with_name(name)
    return replace(spec, log=log, settings=spec.settings.model_copy(update={"work": log.with_name(f"work-{name}")}))


@contextmanager
def maintained(settings: Settings) -> Iterator[None]:
    """Maintenance and a reader in this process, again and again."""
    over = Event()

    def keep() -> None:
        while not over.is_set():
            maintain(settings)
            query(settings, "SELECT count(*) FROM predictions, quarantine")

    with ThreadPoolExecutor(1) as pool:
        kept = pool.submit(keep)
        try:
            yield
        finally:
            over.set()
        kept.result()


def test_kill_at_any_step_on_a_faulty_store_loses_nothing(
    spec: Spec, proxy: StoreProxy, rng: Random, form: Form[list[str]], record: Record
) -> None:
    steps = form([*STEPS * 7, "decide"], [*STEPS])
    rng.shuffle(steps)
    spec = replace(spec, messages=PER_BATCH * (2 * len(steps) + 2))
    proxy.faults = at_random(rng, puts=form(0.10, 0.25))
    for step in steps:
        with Driver(replace(spec, signal_at=(step, rng.choice([1, 2]), signal.SIGKILL))) as driver:
            driver.wait_killed()
    with Driver(spec) as driver:
        assert driver.wait_code() == 0, driver.said()
    check(spec.settings, spec.messages)
    check_one_attempt(spec.settings)
    assert proxy.harmed.keys() >= {Fault.CUT, Fault.LOST, Fault.CONFLICT, Fault.ERROR, Fault.SLOW_DOWN}
    harmed, total = proxy.harmed.total(), len(proxy.requests)
    record("bucket: SIGKILLs, requests harmed", form("50, 10 %", "7, 25 %"), f"{len(steps)}, {harmed} of {total:,}")
    record("bucket: lost, repeated, mixed attempts", "0, 0, 0", "0, 0, 0")


def test_driver_waits_for_an_unavailable_store(spec: Spec, proxy: StoreProxy, form: Form[float]) -> None:
    spec = replace(spec, answer_within_s=form(60.0, 0.5), messages=form(400, 100) * PER_BATCH)
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
        assert driver.wait_code() == 0, driver.said()
    assert all(
        "does not answer" in event["what"] or "did not store" in event["what"] for event in driver.events("away")
    )
    check(spec.settings, spec.messages)


def test_concurrent_drivers_with_maintenance_duplicate_nothing(spec: Spec, form: Form[int], record: Record) -> None:
    starts = form(20, 1)
    for number in range(starts):
        spec = replace(spec, messages=(number + 1) * 10 * PER_BATCH)
        with ExitStack() as stack, maintained(spec.settings):
            both = [stack.enter_context(Driver(other_host(spec, f"{number}-{one}"))) for one in ("a", "b")]
            codes = [driver.wait_code() for driver in both]
        assert 0 in codes, [driver.said() for driver in both]
        assert set(codes) <= {0, FENCED}
    check(spec.settings, spec.messages)
    check_one_attempt(spec.settings)
    record("bucket: two drivers at once, repeated", f"{starts} starts, 0", f"{starts} starts, 0")


def test_driver_suspended_during_compaction_and_pruning_is_fenced(
    spec: Spec, form: Form[list[str]], record: Record
) -> None:
    """It had scored, or decided, what is whole by another driver's work when it wakes; the decision is gone by then.

    The other one quarantines nothing, so that nothing in that table would be in its way.
    """
    steps = form([*STEPS[:-1]], ["score", "decide"])
    settings = spec.settings
    for number, step in enumerate(steps):
        spec = replace(spec, messages=(number + 1) * 10 * PER_BATCH)
        sleeper = replace(other_host(spec, f"sleeper-{step}"), share_of_bad=0.9, known_for_s=0.0)
        other = replace(other_host(spec, f"other-{step}"), share_of_bad=0.0)
        with Driver(replace(sleeper, signal_at=(step, 2, signal.SIGSTOP))) as asleep:
            asleep.wait_stopped()
            with Driver(replace(other, signal_at=("batches", 3, signal.SIGKILL))) as driver:
                driver.wait_killed()
            maintain(settings)
            whole = rows(settings, "SELECT max(batch_id) AS n FROM batches")[0]["n"]
            assert Decisions(settings.place.store, settings.topic).prune(whole, keep=1, kept_for=timedelta(0)) > 0
            asleep.wake()
            assert asleep.wait_code() == 0, asleep.said()
        assert step == "begin" or asleep.events("lost"), asleep.said()
        check(settings, spec.messages)
    record("bucket: drivers asleep at a step, repeated", f"{len(steps)}, 0", f"{len(steps)}, 0")


def test_decision_stored_after_its_driver_died_is_valid(spec: Spec, proxy: StoreProxy) -> None:
    settings = spec.settings
    key = numbered_key(f"streams/{settings.topic}/batches", 2, 20)
    proxy.hold(f"^PUT .*{key}")
    with Driver(spec) as dead:
        assert proxy.wait_held(60), dead.said()
        dead.kill()
    second = replace(other_host(spec, "second"), signal_at=("score", 1, signal.SIGSTOP))
    with Driver(second) as driver:
        driver.wait_stopped()
        assert settings.place.store.get(key) is None
        proxy.release()
        wait_until(lambda: settings.place.store.get(key) is not None, lambda: "the late put did not arrive")
        driver.wake()
        assert driver.wait_code() == 0, driver.said()
    assert len(driver.events("lost")) == 1
    check(settings, spec.messages)
    check_one_attempt(settings)


def test_killed_and_restarted_store_loses_nothing(tmp_path: Path, form: Form[bool]) -> None:
    """In `make soak`, with a server of its own."""
    if not form(True, False):
        pytest.skip("only with --full: it starts a store of its own twice")
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
                assert driver.wait_code() == 0, driver.said()
            check(settings, spec.messages)
            assert open_store(settings.home).folders() == ["streams", "tables"]
        finally:
            stop_object_store(home)
