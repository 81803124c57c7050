"""Drivers of the commit protocol without Spark and Kafka, as processes that can be killed and stopped at each step.

What they "score" is made up, and differs from attempt to attempt: whether a message is predicted or quarantined is
drawn, and each row names its attempt. So two attempts that get mixed show as messages that are lost or repeated.
Everything else is the product's: `BatchCommitter`, decisions, tables and store.
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
from tests.faults.harness import PATIENCE_S, check_answers, rows, wait_until
from tests.streaming.history import NOON, SHA256, begin_stream

PARTITIONS = (0, 1)
TOPIC_ID = "topic-id"
PAUSE_S = 0.1
FENCED = 3  # exit code


@dataclass(frozen=True)
class Spec:
    """What a driver does.

    Attributes:
        messages: of each partition.
        per_batch: messages of each partition in a micro-batch.
        signal_at: a step, the first micro-batch of this run (from 1) to send a signal to itself in, and the signal.
        first: in that micro-batch, what is made to be done before the other: "answers" or "tables"; None: as it comes.
        share_of_bad: of the messages that it quarantines.
        known_for_s: in place of `table_log.KNOWN_FOR_S`.
        answer_within_s: in place of `store_base.CREATE_TIMEOUT_S`.
        variables: of its environment.
    """

    settings: Settings
    log: Path
    messages: int
    per_batch: int
    signal_at: tuple[str, int, signal.Signals] | None = None
    first: str | None = None
    share_of_bad: float = 0.3
    known_for_s: float = table_log.KNOWN_FOR_S
    answer_within_s: float = store_base.CREATE_TIMEOUT_S
    variables: Mapping[str, str] = field(default_factory=dict)


class _Serving:
    """A model that is there; the aliases are followed as the stream does."""

    def __init__(self, registry: Registry) -> None:
        self.champion = SimpleNamespace(version=ModelVersion(1, SHA256), reference=None)
        self.challenger = None
        self.refused: dict[int, str] = {}
        self._registry = registry

    def follow(self) -> None:
        self._registry.targets()


class _Committer(BatchCommitter):
    """Draws what becomes of each message."""

    share_of_bad: float

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
            bad = [row for row in of_range if rng.random() < self.share_of_bad]
            good = [row for row in of_range if row not in bad]
            trace = {"traceparent": f"00-{attempt}-00f067aa0ba902b7-01"}
            predicted += [row | trace | {"label": "cat", "confidence": 0.5, "scored_at": NOON} for row in good]
            headers = [{"key": name, "value": value.encode()} for name, value in trace.items()]
            worse = [row | lineage | {"reason": "truncated", "value": b"bad", "headers": headers} for row in bad]
            features = [row | {"backbone_sha256": SHA256, "features": [0.0]} for row in good]
            reports.append(
                PartitionReport(
                    read=[OffsetRun(one.topic, one.partition, len(of_range), one.start, one.end - 1)],
                    quarantined_at=[(one.topic, one.partition, len(bad))] if bad else [],
                    quarantined={"truncated": len(bad)} if bad else {},
                    quarantine_file=_file(self._tables["quarantine"].place, worse, QUARANTINE),
                    features_file=_file(self._tables["features"].place, features, FEATURES),
                )
            )
        quarantined = Counter[str]()
        for report in reports:
            quarantined.update(report.quarantined)
        return _Scored(pa.Table.from_pylist(predicted, schema=OUTPUT), reports, dict(quarantined))


def _file(place: str, of_file: list[dict[str, Any]], schema: pa.Schema) -> DataFile | None:
    """As a worker writes it."""
    with FileSink(place, schema) as sink:
        sink.write(pa.Table.from_pylist(of_file, schema=schema))
        return sink.close()


class _Log:
    """One JSON line per event; the driver may send itself a signal at one of them.

    Where answers are to be first, `before_tables` waits for them; else, where tables are to be, the step "send" does.
    """

    def __init__(self, spec: Spec) -> None:
        self._file = spec.log.open("a", encoding="utf-8")
        self._signal_at = spec.signal_at
        self._first = spec.first
        self._batches = 0
        self._done = {"tables": threading.Event(), "answers": threading.Event()}

    def note(self, event: str, **what: Any) -> None:
        self._file.write(json.dumps({"at": time.time(), "event": event, **what}) + "\n")
        self._file.flush()

    def before_tables(self) -> None:
        self._after("answers")

    def _after(self, first: str) -> None:
        """Wait for what is to be first in the micro-batch of the signal."""
        if self._first == first and self._signal_at is not None and self._batches == self._signal_at[1]:
            self._done[first].wait(PATIENCE_S)

    def on_step(self, step: str) -> None:
        self._batches += step == STEPS[0]
        if step == DECIDED_TABLES[-1]:
            self._done["tables"].set()
        if step == "answers":
            self._done["answers"].set()
        if step == "send":
            self._after("tables")
        # In a later micro-batch if the store was away in that one, which was then completed without this step.
        if self._signal_at is not None and step == self._signal_at[0] and self._batches >= self._signal_at[1]:
            self.note("signal", step=step)
            number, self._signal_at = self._signal_at[2], None
            os.kill(os.getpid(), number)

    def on_batch(self, batch: BatchResult) -> None:
        self.note("batch", id=batch.batch_id, seconds=batch.seconds)


class _Tables(Tables):
    """Tables that may have to wait for the answers."""

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
    tables = _Tables(place.tables, log.before_tables)  # kept open when the driver plans again, as the stream does
    answers = AnswersTopic(spec.settings)
    answers.prepare(Subscription((topic,)))
    committer = _Committer(
        _Serving(Registry(place.store)),  # type: ignore[arg-type]
        tables,
        Decisions(place.store, topic),
        _witness,
        store_features=True,
        answers=answers,
        on_batch=log.on_batch,
        on_step=log.on_step,
    )
    committer.share_of_bad = spec.share_of_bad
    lost = 0
    while lost < MAX_LOST:
        try:
            _drive(spec, committer, tables, answers)
        except (AnswersAwayError, StoreAwayError) as error:
            log.note("away", what=str(error))
            time.sleep(PAUSE_S)
        except LostDecisionError as error:
            log.note("lost", what=str(error))
            lost += 1
        else:
            log.note("end")
            return
    sys.exit(FENCED)


def _drive(spec: Spec, committer: _Committer, tables: Tables, answers: AnswersTopic) -> None:
    """As the stream starts its query, and runs it until there are no messages left."""
    settings, topic = spec.settings, spec.settings.topic
    positions = finish_decided(settings, topic, tables, answers)
    assert positions is not None
    assert positions.stream is not None
    answers.begin(positions.stream, positions.number)
    begins, ends = dict.fromkeys(PARTITIONS, 0), dict.fromkeys(PARTITIONS, spec.messages)
    committer.plan = plan_start(positions, Topic(topic, TOPIC_ID, begins, ends), Accept())
    at = {one: positions.of_topic(topic).get(one, 0) for one in PARTITIONS}
    while ranges := _next(topic, at, spec):
        committer(SimpleNamespace(ranges=ranges, sparkSession=_NO_SPARK), ranges)  # type: ignore[arg-type]
        at |= {one.partition: one.end for one in ranges}


def _witness(topics: Collection[str], _: Collection[TopicPartition]) -> "Future[TopicSnapshot]":
    """Kafka's topics, which stay the same."""
    seen: Future[TopicSnapshot] = Future()
    seen.set_result(TopicSnapshot(dict.fromkeys(topics, TOPIC_ID), {}))
    return seen


_NO_SPARK = SimpleNamespace(sparkContext=SimpleNamespace(defaultParallelism=1))


def _next(topic: str, at: Mapping[int, int], spec: Spec) -> Sequence[OffsetRange]:
    ends = {one: min(at[one] + spec.per_batch, spec.messages) for one in PARTITIONS}
    return [OffsetRange(topic, one, at[one], ends[one]) for one in PARTITIONS if at[one] < ends[one]]


# Processes begin with all modules imported, and no thread or connection yet.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["tests.faults.protocol"])


class Driver:
    """A process that drives a stream to its end, unless it is killed or stopped."""

    def __init__(self, spec: Spec) -> None:
        self._spec = spec
        self._process = _FORKS.Process(target=_run, args=(spec,))
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
        noted = [json.loads(line) for line in self._spec.log.read_text(encoding="utf-8").splitlines()]
        return [event for event in noted if event["event"] == kind]

    def said(self) -> str:
        return self._spec.log.read_text(encoding="utf-8")[-3_000:] if self._spec.log.exists() else ""

    def wait_code(self) -> int:
        """Wait until it has ended; its exit code, or minus the signal that killed it."""
        self._process.join(300)
        assert self._process.exitcode is not None, self.said()
        return self._process.exitcode

    def wait_killed(self) -> None:
        assert self.wait_code() == -signal.SIGKILL, self.said()

    def wait_stopped(self) -> None:
        def stopped() -> bool:
            assert self._process.is_alive(), self.said()
            return psutil.Process(self._process.pid).status() == psutil.STATUS_STOPPED

        wait_until(stopped, self.said)

    def wait_for(self, kind: str, count: int = 1) -> None:
        wait_until(lambda: len(self.events(kind)) >= count, self.said)

    def kill(self) -> None:
        self._process.kill()
        self._process.join()

    def wake(self) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, signal.SIGCONT)


def begin(settings: Settings) -> None:
    """The stream and its tables, as its first start makes them."""
    for name in SCHEMAS:
        Tables(settings.place.tables)[name]
    begin_stream(settings)


def check(settings: Settings, messages: int) -> None:
    """Every message has one row, those predicted have features, and the rows of a batch are of one attempt."""
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
    of_features = 'SELECT "partition", "offset", source FROM {} ORDER BY "partition", "offset"'
    assert rows(settings, of_features.format("features")) == rows(settings, of_features.format("predictions"))
    report = audit(settings)
    assert report.clean, [problem.text for problem in report.problems]
    assert not report.unfinished
    check_answers(settings)
