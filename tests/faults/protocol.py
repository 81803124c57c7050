"""Drivers of the commit protocol without Spark and Kafka: processes that can be killed or suspended at each step.

Scores are simulated and differ between attempts: whether a message is predicted or quarantined is random, and each row
names its attempt, so that mixed attempts show as lost or repeated messages. Everything else is the real code:
`BatchCommitter`, decisions, tables and store.
"""

import json
import multiprocessing
import os
import signal
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any, Self

import psutil
import pyarrow as pa

from streaming.jobs.audit import audit
from streaming.pipeline.answers_reader import AnswersAwayError
from streaming.pipeline.answers_topic import AnswersTopic
from streaming.pipeline.commit import STEPS, BatchCommitter, BatchResult, LostDecisionError, _Scored
from streaming.pipeline.decisions import DECIDED_TABLES, Decisions, ModelVersion, OffsetRange, TopicPartition
from streaming.pipeline.finish import Tables, finish_decided
from streaming.pipeline.positions import Accept, plan_start
from streaming.pipeline.reconcile import OffsetRun, TopicSnapshot
from streaming.pipeline.score import OUTPUT, PartitionReport
from streaming.pipeline.stream import MAX_LOST
from streaming.platform.topic import Subscription, Topic
from streaming.registry import Registry
from streaming.settings import Settings
from streaming.storage import store_base, table_log
from streaming.storage.files import DataFile, FileSink
from streaming.storage.store_errors import StoreAwayError
from streaming.storage.tables import FEATURES, QUARANTINE, SCHEMAS, Table
from tests.faults.harness import TIMEOUT_S, check_answers, rows, wait_until
from tests.streaming.history import NOON, SHA256, begin_stream

PARTITIONS = (0, 1)
TOPIC_ID = "topic-id"
PAUSE_S = 0.1
FENCED = 3  # exit code


@dataclass(frozen=True)
class Spec:
    """Configuration of a driver.

    Attributes:
        messages: of each partition.
        per_batch: messages of each partition in a micro-batch.
        signal_at: step and first micro-batch of this run (from 1) at which to send itself a signal, and the signal.
        first: "answers" or "tables", to complete first in that micro-batch; None: in any order.
        bad_fraction: fraction of messages to quarantine.
        known_for_s: replaces `table_log.KNOWN_FOR_S`.
        answer_within_s: replaces `store_base.CREATE_TIMEOUT_S`.
        variables: additional environment variables.
    """

    settings: Settings
    log: Path
    messages: int
    per_batch: int
    signal_at: tuple[str, int, signal.Signals] | None = None
    first: str | None = None
    bad_fraction: float = 0.3
    known_for_s: float = table_log.KNOWN_FOR_S
    answer_within_s: float = store_base.CREATE_TIMEOUT_S
    variables: Mapping[str, str] = field(default_factory=dict)


class _Models:
    """A model manager with a fixed champion, which reads the aliases as the stream does."""

    def __init__(self, registry: Registry) -> None:
        self.champion = SimpleNamespace(version=ModelVersion(1, SHA256), reference=None)
        self.challenger = None
        self.refused: dict[int, str] = {}
        self._registry = registry

    def follow(self) -> None:
        self._registry.targets()


class _Committer(BatchCommitter):
    """Predicts or quarantines each message at random."""

    bad_fraction: float

    def _score(self, messages: Any, champion: Any, challenger: Any) -> _Scored:
        attempt, rng = uuid.uuid4().hex, Random()  # noqa: S311  no secret
        reports, predicted = [], []
        model = {"model_version": 1, "bundle_sha256": SHA256}
        lineage = model | {"query_id": self.plan.stream, "batch_id": self.plan.number + 1}
        for one in messages.ranges:
            common = {
                "topic": one.topic,
                "partition": one.partition,
                "source": attempt,
                "published_at": NOON,
                "key": b"k",
            }
            of_range = [common | {"offset": n, "image_id": f"{one.partition}-{n}"} for n in range(one.start, one.end)]
            bad = [row for row in of_range if rng.random() < self.bad_fraction]
            good = [row for row in of_range if row not in bad]
            trace = {"traceparent": f"00-{attempt}-00f067aa0ba902b7-01"}
            predicted += [row | trace | {"label": "cat", "confidence": 0.5, "scored_at": NOON} for row in good]
            headers = [{"key": name, "value": value.encode()} for name, value in trace.items()]
            quarantined = [row | lineage | {"reason": "truncated", "value": b"bad", "headers": headers} for row in bad]
            features = [row | {"backbone_sha256": SHA256, "features": [0.0]} for row in good]
            reports.append(
                PartitionReport(
                    read=[OffsetRun(one.topic, one.partition, len(of_range), one.start, one.end - 1)],
                    quarantined_at=[(one.topic, one.partition, len(bad))] if bad else [],
                    quarantined={"truncated": len(bad)} if bad else {},
                    quarantine_file=_file(self._tables["quarantine"].place, quarantined, QUARANTINE),
                    features_file=_file(self._tables["features"].place, features, FEATURES),
                )
            )
        reasons = Counter[str]()
        for report in reports:
            reasons.update(report.quarantined)
        return _Scored(pa.Table.from_pylist(predicted, schema=OUTPUT), reports, dict(reasons))


def _file(place: str, content: list[dict[str, Any]], schema: pa.Schema) -> DataFile | None:
    """A file as a worker writes it."""
    with FileSink(place, schema) as sink:
        sink.write(pa.Table.from_pylist(content, schema=schema))
        return sink.close()


class _Log:
    """Writes one JSON line per event, and sends the driver its signal.

    `before_tables` waits for answers that must be first; the step "send" waits for tables that must be first.
    """

    def __init__(self, spec: Spec) -> None:
        self._file = spec.log.open("a", encoding="utf-8")
        self._signal_at = spec.signal_at
        self._first = spec.first
        self._batches = 0
        self._done = {"tables": threading.Event(), "answers": threading.Event()}

    def write(self, event: str, **what: Any) -> None:
        self._file.write(json.dumps({"at": time.time(), "event": event, **what}) + "\n")
        self._file.flush()

    def before_tables(self) -> None:
        self._after("answers")

    def _after(self, first: str) -> None:
        """Wait until `first` is complete, if it must be first in the micro-batch of the signal."""
        if self._first == first and self._signal_at is not None and self._batches == self._signal_at[1]:
            self._done[first].wait(TIMEOUT_S)

    def on_step(self, step: str) -> None:
        self._batches += step == STEPS[0]
        if step == DECIDED_TABLES[-1]:
            self._done["tables"].set()
        if step == "answers":
            self._done["answers"].set()
        if step == "send":
            self._after("tables")
        # In a later micro-batch if that one was completed without this step because the store was unavailable.
        if self._signal_at is not None and step == self._signal_at[0] and self._batches >= self._signal_at[1]:
            self.write("signal", step=step)
            number, self._signal_at = self._signal_at[2], None
            os.kill(os.getpid(), number)

    def on_batch(self, batch: BatchResult) -> None:
        self.write("batch", id=batch.batch_id, seconds=batch.seconds)


class _Tables(Tables):
    """Tables whose appends call `before` first."""

    def __init__(self, place: str, before: Callable[[], None]) -> None:
        super().__init__(place)
        self._before = before

    def __getitem__(self, name: str) -> Table:
        new = name not in self._open
        table = super().__getitem__(name)
        if new and name in DECIDED_TABLES:
            append = table.append_files

            def append_files(*arguments: Any) -> bool:
                self._before()
                return append(*arguments)

            table.append_files = append_files  # type: ignore[method-assign]
        return table


def _run(spec: Spec) -> None:
    os.environ.update(spec.variables)
    table_log.KNOWN_FOR_S, store_base.CREATE_TIMEOUT_S = spec.known_for_s, spec.answer_within_s
    log, place, topic = _Log(spec), spec.settings.place, spec.settings.topic
    tables = _Tables(place.tables, log.before_tables)  # kept open between plans, as the stream does
    answers = AnswersTopic(spec.settings)
    answers.prepare(Subscription((topic,)))
    committer = _Committer(
        _Models(Registry(place.store)),  # type: ignore[arg-type]
        tables,
        Decisions(place.store, topic),
        _witness,
        store_features=True,
        answers=answers,
        on_batch=log.on_batch,
        on_step=log.on_step,
    )
    committer.bad_fraction = spec.bad_fraction
    lost = 0
    while lost < MAX_LOST:
        try:
            _drive(spec, committer, tables, answers)
        except (AnswersAwayError, StoreAwayError) as error:
            log.write("away", what=str(error))
            time.sleep(PAUSE_S)
        except LostDecisionError as error:
            log.write("lost", what=str(error))
            lost += 1
        else:
            log.write("end")
            return
    sys.exit(FENCED)


def _drive(spec: Spec, committer: _Committer, tables: Tables, answers: AnswersTopic) -> None:
    """Start the query as the stream does, and run it until no messages are left."""
    settings, topic = spec.settings, spec.settings.topic
    positions = finish_decided(settings, topic, tables, answers)
    assert positions is not None
    assert positions.stream is not None
    answers.begin(positions.stream, positions.number)
    begins, ends = dict.fromkeys(PARTITIONS, 0), dict.fromkeys(PARTITIONS, spec.messages)
    committer.plan = plan_start(positions, Topic(topic, TOPIC_ID, begins, ends), Accept())
    at = {one: positions.of_topic(topic).get(one, 0) for one in PARTITIONS}
    while ranges := _next(topic, at, spec):
        committer(SimpleNamespace(ranges=ranges, sparkSession=NO_SPARK), ranges)  # type: ignore[arg-type]
        at |= {one.partition: one.end for one in ranges}


def _witness(topics: Collection[str], _: Collection[TopicPartition]) -> "Future[TopicSnapshot]":
    """A snapshot of Kafka's topics, which never change."""
    snapshot: Future[TopicSnapshot] = Future()
    snapshot.set_result(TopicSnapshot(dict.fromkeys(topics, TOPIC_ID), {}))
    return snapshot


NO_SPARK = SimpleNamespace(sparkContext=SimpleNamespace(defaultParallelism=1))


def _next(topic: str, at: Mapping[int, int], spec: Spec) -> Sequence[OffsetRange]:
    ends = {one: min(at[one] + spec.per_batch, spec.messages) for one in PARTITIONS}
    return [OffsetRange(topic, one, at[one], ends[one]) for one in PARTITIONS if at[one] < ends[one]]


# Processes start with all modules imported and without threads or connections.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.faults.protocol"])


class Driver:
    """A process that drives a stream to its end, unless it is killed or suspended."""

    def __init__(self, spec: Spec) -> None:
        self._spec = spec
        self._process = FORKS.Process(target=_run, args=(spec,))
        self._process.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.is_alive():
            self._process.kill()
        self._process.join()

    def events(self, kind: str) -> list[dict[str, Any]]:
        if not self._spec.log.exists():
            return []
        events = [json.loads(line) for line in self._spec.log.read_text(encoding="utf-8").splitlines()]
        return [event for event in events if event["event"] == kind]

    def log_tail(self) -> str:
        return self._spec.log.read_text(encoding="utf-8")[-3_000:] if self._spec.log.exists() else ""

    def wait_ended(self) -> int:
        """Wait until it has ended; returns its exit code, or the negative signal that killed it."""
        self._process.join(TIMEOUT_S)
        assert self._process.exitcode is not None, self.log_tail()
        return self._process.exitcode

    def wait_killed(self) -> None:
        assert self.wait_ended() == -signal.SIGKILL, self.log_tail()

    def wait_suspended(self) -> None:
        def suspended() -> bool:
            assert self._process.is_alive(), self.log_tail()
            return psutil.Process(self._process.pid).status() == psutil.STATUS_STOPPED

        wait_until(suspended, self.log_tail)

    def wait_for(self, kind: str, count: int = 1) -> None:
        wait_until(lambda: len(self.events(kind)) >= count, self.log_tail)

    def kill(self) -> None:
        self._process.kill()
        self._process.join()

    def resume(self) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, signal.SIGCONT)


def begin(settings: Settings) -> None:
    """Create the stream and its tables as its first start does."""
    for name in SCHEMAS:
        Tables(settings.place.tables)[name]
    begin_stream(settings)


def check(settings: Settings, messages: int) -> None:
    """Every message has one row, predicted ones have features, and the rows of a batch are from one attempt."""
    found = rows(
        settings,
        'SELECT "partition", "offset", batch_id, source FROM predictions UNION ALL '
        'SELECT "partition", "offset", batch_id, source FROM quarantine',
    )
    expected = Counter({(one, offset): 1 for one in PARTITIONS for offset in range(messages)})
    counted = Counter((row["partition"], row["offset"]) for row in found)
    assert counted == expected, f"lost: {expected - counted}, repeated: {counted - expected}"
    attempts = {(row["batch_id"], row["source"]) for row in found}
    assert len(attempts) == len({batch for batch, _ in attempts})
    sources = 'SELECT "partition", "offset", source FROM {} ORDER BY "partition", "offset"'
    assert rows(settings, sources.format("features")) == rows(settings, sources.format("predictions"))
    report = audit(settings)
    assert report.clean, [problem.text for problem in report.problems]
    assert not report.unfinished
    check_answers(settings)
