"""Many consecutive micro-batches with concurrent maintenance, and the same decisions applied again."""

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from random import Random
from statistics import mean, median
from typing import Any

import pytest
from deltalake import DeltaTable

from examples.memory import MemoryWatch
from streaming.jobs.maintain import maintain
from streaming.pipeline.decisions import KEPT
from streaming.pipeline.finish import Tables, apply
from streaming.settings import Settings
from tests.conftest import NewService
from tests.faults.harness import (
    Drained,
    Sent,
    Stream,
    check_exactly_once,
    decisions,
    drain,
    send,
    stream_during,
    versions,
)
from tests.faults.poison import generator, samples
from tests.forms import Form, Record

MAX_LIVE_FILES = 50
Run = tuple[list[float], dict[str, int]]  # times of commits; as `Soaked.most_files`


@dataclass
class Soaked:
    """A service that has run for a long time."""

    settings: Settings
    sent: Sent
    images_per_batch: int
    most_files: dict[str, int]  # table → maximum number of live files after maintenance


@contextmanager
def _maintained(settings: Settings, every_s: float) -> Iterator[dict[str, int]]:
    """Repeated maintenance while a stream runs; yields the maximum number of live files of each table after it."""
    ended = threading.Event()
    most: dict[str, int] = {}
    failures: list[BaseException] = []

    def repeat() -> None:
        try:
            while not ended.wait(every_s):
                for table in maintain(settings).tables:
                    most[table.name] = max(most.get(table.name, 0), table.files_after)
        except BaseException as error:  # noqa: BLE001  raised below in the thread of the test
            failures.append(error)

    thread = threading.Thread(target=repeat)
    thread.start()
    try:
        yield most
    finally:
        ended.set()
        thread.join()
    if failures:
        raise failures[0]


def _in_this_process(settings: Settings, size: int, messages: int, _: Record) -> Run:
    """In the Spark session of the tests."""
    most: dict[str, int] = {}

    def maintain_until_drained(stream: Drained) -> None:
        stream.wait_for(lambda: bool(stream.batches))
        with _maintained(settings, 0.5) as found:
            stream.wait_for(lambda: stream.rows == messages and bool(found))
        most.update(found)

    return stream_during(settings, maintain_until_drained, images_per_batch=size).committed_at, most


def _in_a_process(settings: Settings, size: int, _: int, record: Record) -> Run:
    """In a separate process, with records of the time of a batch and of the memory."""
    with Stream(settings, images_per_batch=size, until_drained=True) as stream:
        stream.wait_for(lambda: bool(stream.events("batch")))
        with MemoryWatch(stream.process.pid) as watch, _maintained(settings, 30) as most:
            stream.wait_ended()
    commits = [event["at"] for event in stream.events("batch")]
    quarter = max(1, len(commits) // 4)
    intervals = [later - earlier for earlier, later in pairwise(commits)]
    ratio = median(intervals[-quarter:]) / median(intervals[:quarter])
    record("soak: last quarter's batch time / first's", "≤ 1.1", f"{ratio:.2f}")
    memory = [(one.java + one.others) / 1e6 for one in watch.samples]
    quarter = max(1, len(memory) // 4)
    first, last = mean(memory[:quarter]), mean(memory[-quarter:])
    record("soak: memory, first and last quarter", "constant", f"{first:,.0f} MB, {last:,.0f} MB")
    return commits, most


@pytest.fixture(scope="module")
def soaked(new_service: NewService, form: Form[Any], seed: int, record: Record) -> Soaked:
    batches, size = form(1_000, 16), form(50, 8)
    settings, rng = new_service(), generator(seed)
    sent: Sent = {}
    for _ in range(8):
        sent |= send(settings, samples(rng, good=batches * size * 9 // 80, bad=batches * size // 80))
    commits, most = form(_in_a_process, _in_this_process)(settings, size, len(sent), record)
    assert len(commits) >= batches
    record("soak: micro-batches", str(batches), f"{len(commits):,} in {commits[-1] - commits[0]:.0f} s")
    return Soaked(settings, sent, size, dict(most))


def test_long_run_has_one_row_per_message(soaked: Soaked) -> None:
    check_exactly_once(soaked.settings, soaked.sent)


def test_concurrent_maintenance_limits_live_files(soaked: Soaked, record: Record) -> None:
    assert soaked.most_files, "maintenance never ran while the stream did"
    assert max(soaked.most_files.values()) <= MAX_LIVE_FILES
    maintain(soaked.settings)
    live = {path.name: len(DeltaTable(path).file_uris()) for path in Path(soaked.settings.place.tables).iterdir()}
    assert max(live.values()) <= MAX_LIVE_FILES
    record("soak: live files per table", f"≤ {MAX_LIVE_FILES}", f"≤ {max(soaked.most_files.values())}")
    check_exactly_once(soaked.settings, soaked.sent)


def test_reapplied_decisions_change_no_table_and_a_lost_streams_folder_skips_no_message(
    soaked: Soaked, form: Form[int], record: Record, rng: Random
) -> None:
    """One test, since new batches delete old decisions. Without its folder, the stream continues from the tables."""
    settings = soaked.settings
    kept, before = decisions(settings), versions(settings)
    assert len(kept) >= form(KEPT, 16)
    for decision in kept:
        assert apply(decision, Tables(settings.place.tables), fresh=False) == (decision.number == kept[-1].number)
    assert drain(settings, images_per_batch=soaked.images_per_batch).batches == []

    assert versions(settings) == before
    record("replay: decisions applied again, changes", "0", f"{len(kept):,} decisions, 0")

    shutil.rmtree(settings.work_dir / "streams")
    soaked.sent |= send(settings, samples(rng, good=soaked.images_per_batch, bad=0))
    drain(settings, images_per_batch=4 * soaked.images_per_batch)
    check_exactly_once(settings, soaked.sent)
