"""SIGKILL at the steps of the commit protocol and in between: no message is lost or has two rows or two answers.

The topic has holes, because half of its messages are in transactions. The short form kills the stream before its
decision and between two tables; test_answers.py and test_store_faults.py kill drivers without Spark at every step.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from time import sleep
from uuid import uuid4

import pytest

from streaming.jobs.maintain import maintain
from streaming.pipeline.commit import ANSWER_STEPS, STEPS
from streaming.pipeline.decisions import Decision
from streaming.platform.broker import start_broker, stop_broker
from streaming.registry import open_registry
from streaming.settings import Settings
from tests.conftest import NewService, service_in_bucket
from tests.faults.harness import (
    Sent,
    Stream,
    check_exactly_once,
    check_one_attempt,
    decisions,
    drain,
    register_copy,
    rows,
    scored,
    send,
    send_in_transactions,
)
from tests.faults.poison import generator, samples
from tests.forms import Form, Record
from tests.object_store import ObjectStoreServer
from tests.store_proxy import StoreProxy, at_random

SHORT = ("score", "quarantine")
MAX_RUN_S = 20.0  # before a kill at a random time


@dataclass(frozen=True)
class Survived:
    """A service after all kills."""

    settings: Settings
    sent: Sent
    recoveries_s: list[float]
    unfinished: list[Decision]  # decisions of batches that a kill left incomplete


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """With --full, run on every kind of home; test_store_faults.py has the short form for buckets."""
    full = metafunc.config.getoption("full")
    if "killed_on" in metafunc.fixturenames:
        kinds = ["local", "bucket", "faulty bucket"] if full else ["local"]
        metafunc.parametrize("killed_on", kinds, scope="module")
    if "decided_on" in metafunc.fixturenames:
        metafunc.parametrize("decided_on", ["bucket", "local"])


@pytest.fixture(scope="module")
def settings(
    killed_on: str,
    new_service: NewService,
    broker: Settings,
    trained: Path,
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
) -> Iterator[Settings]:
    """A service with the kind of home `killed_on`."""
    answers = {"answers_topic": f"answers-{uuid4().hex[:8]}", "answers": "both"}
    if killed_on == "local":
        yield new_service().model_copy(update=answers)
        return
    server: ObjectStoreServer = request.getfixturevalue("object_store")
    with StoreProxy(server.port) as proxy:
        if killed_on == "faulty bucket":
            proxy.faults = at_random(generator(seed))
        folder = tmp_path_factory.mktemp("killed") / "work"
        with service_in_bucket(server, broker, trained, folder, proxy.port) as settings:
            yield settings.model_copy(update=answers)


@pytest.fixture(scope="module")
def survived(settings: Settings, killed_on: str, form: Form, seed: int, record: Record) -> Survived:
    """A stream that was killed at each step of `SHORT` (full: 4 times at every step and 14 times at random) and then
    finished. The champion changes after each kill; every second group of messages is in transactions, with aborted ones
    in between."""
    rng = generator(seed)
    every: list[str | None] = [*(*STEPS, *ANSWER_STEPS) * 4, *[None] * 14]
    rng.shuffle(every)
    plan = form(every, [*SHORT])
    good, bad, size = form((300, 100, 140), (28, 12, 28))
    versions, registry = [1, register_copy(settings)], open_registry(settings.home)
    sent = send(settings, samples(rng, good=good, bad=bad))
    recoveries: list[float] = []
    unfinished: list[Decision] = []
    last_kill = None
    for number, step in enumerate(plan):
        kill = (step, rng.choice([1, 2])) if step else None
        with Stream(settings, images_per_batch=size, kill=kill) as stream:
            if number + 1 < len(plan):
                send_group = send if number % 2 else send_in_transactions
                sent |= send_group(settings, samples(rng, good=good, bad=bad))
            if kill is None:
                sleep(rng.uniform(0, MAX_RUN_S))
                killed_at = stream.kill_now()
            else:
                killed_at = stream.wait_killed()
        recoveries += _recovery(stream, last_kill)
        last_kill = killed_at
        unfinished += _unfinished(settings)
        registry.promote(versions[number % 2 - 1], by="test", why="test")
    drain(settings, images_per_batch=size)

    record(f"kill, {killed_on}: messages, SIGKILLs", form("20,000, 50", "80, 2"), f"{len(sent):,}, {len(plan)}")
    if len(recoveries) > 1:
        record(
            f"recovery, {killed_on}: SIGKILL to new commit",
            "p95 ≤ 60 s",
            f"p50 {median(recoveries):.1f} s, p95 {quantiles(recoveries, n=20)[-1]:.1f} s",
        )
    return Survived(settings, sent, recoveries, unfinished)


def _recovery(stream: Stream, last_kill: float | None) -> list[float]:
    """Seconds from the last kill to the first commit of this run, if both exist."""
    commits = stream.events("batch")
    return [commits[0]["at"] - last_kill] if commits and last_kill is not None else []


def _unfinished(settings: Settings) -> list[Decision]:
    """The decisions without a row in `batches`: at most the last one."""
    complete = {row["batch_id"] for row in rows(settings, "SELECT batch_id FROM batches")}
    return [one for one in decisions(settings) if one.number not in complete]


def test_kills_lose_and_duplicate_no_message(survived: Survived, record: Record) -> None:
    check_exactly_once(survived.settings, survived.sent)
    record("kill: lost, repeated, inconsistent", "0, 0, 0", "0, 0, 0")


def test_decided_batch_is_finished_with_its_model_and_files(survived: Survived, form: Form[int]) -> None:
    assert len(survived.unfinished) >= form(4, 1)  # killed at "decide" or later, and before "batches"
    batches = {row["batch_id"]: row for row in rows(survived.settings, "SELECT * FROM batches")}
    for decision in survived.unfinished:
        assert batches[decision.number]["model_version"] == decision.model.version
    check_one_attempt(survived.settings)
    by_batch = rows(
        survived.settings, "SELECT batch_id, count(DISTINCT model_version) AS n FROM predictions GROUP BY batch_id"
    )
    assert {row["n"] for row in by_batch} == {1}
    assert len({row["model_version"] for row in batches.values()}) == 2


@pytest.mark.full_only  # test_stream.py and test_store_faults.py have short ones, on a local home and on a bucket
def test_decided_batch_is_finished_without_broker_and_bundle(
    decided_on: str, request: pytest.FixtureRequest, fragile_broker: Settings, seed: int
) -> None:
    service: Settings = request.getfixturevalue("service" if decided_on == "local" else "bucket_service")
    service = service.model_copy(update={"bootstrap_servers": fragile_broker.bootstrap_servers})
    sent = send(service, samples(generator(seed), good=12, bad=3))
    with Stream(service, kill=("decide", 1)) as stream:
        stream.wait_killed()
    assert scored(service) == 0
    stop_broker(fragile_broker)
    store = service.place.store
    models = {stored.key: store.get(stored.key) for stored in store.list("models")}
    assert models
    store.delete(models)
    try:
        maintain(service)
        assert scored(service) == len(sent)
    finally:
        start_broker(fragile_broker)
    check_exactly_once(service, sent)
    check_one_attempt(service)
