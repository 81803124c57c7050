"""Shared parts of the scenarios: sending messages, a stream in a separate process group, and independent checks.

The checks read the tables with deltalake only and compare each message with the broker's acknowledgements.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self
from uuid import uuid4

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import DeltaTable, QueryBuilder
from kafka import KafkaConsumer, KafkaProducer, TopicPartition

from producer.message import HEADER_MARGIN_BYTES, MAX_MESSAGE_BYTES
from streaming.jobs.audit import audit
from streaming.pipeline.answer_message import answer_message
from streaming.pipeline.answers_topic import TABLES_BY_SETTING
from streaming.pipeline.commit import BatchResult
from streaming.pipeline.decisions import Decision
from streaming.pipeline.payload import RAW, Payload
from streaming.pipeline.stream import StreamEvents, StreamOptions, run_stream
from streaming.registry import open_registry
from streaming.settings import Settings
from streaming.storage.home import TABLES_FOLDER
from streaming.storage.table_log import open_delta
from tests.conftest import CHECKOUT, SPARK
from tests.faults.poison import Sample

TIMEOUT_S = 300.0  # of waiting for an event
POLL_S = 0.5  # a query of the tables takes a tenth of that
HEAVY_BYTES = 1_000_000

Position = tuple[int, int]  # partition, offset


@dataclass(frozen=True)
class Expected:
    """The expected outcome of a message that the broker acknowledged."""

    kind: str
    reason: str | None  # None: predicted
    sha256: str

    @classmethod
    def of(cls, sample: Sample) -> Self:
        reason = None if sample.reason is None else str(sample.reason)
        return cls(sample.kind, reason, hashlib.sha256(sample.value or b"").hexdigest())


Sent = dict[Position, Expected]


def send(settings: Settings, samples: Iterable[Sample]) -> Sent:
    """Send messages and wait until the broker has acknowledged each; returns their partitions and offsets."""
    producer = KafkaProducer(
        bootstrap_servers=settings.bootstrap_servers,
        acks="all",
        enable_idempotence=True,
        linger_ms=5,
        max_request_size=MAX_MESSAGE_BYTES + HEADER_MARGIN_BYTES,
    )
    sent: Sent = {}
    pending = []

    def wait_for_pending() -> None:
        for sample, future in pending:
            metadata = future.get(300)
            sent[metadata.partition, metadata.offset] = Expected.of(sample)
        pending.clear()

    try:
        for sample in samples:
            pending.append((sample, producer.send(settings.topic, sample.value, sample.key, sample.headers)))
            if len(pending) >= 500 or len(sample.value or b"") > HEAVY_BYTES:
                wait_for_pending()
        wait_for_pending()
    finally:
        producer.close(timeout=10)
    return sent


def send_in_transactions(settings: Settings, samples: Sequence[Sample], size: int = 8) -> Sent:
    """As `send`, in committed transactions of `size` messages, each preceded by an aborted one of at most two."""
    producer = KafkaProducer(
        bootstrap_servers=settings.bootstrap_servers, transactional_id=f"test-{uuid4()}", acks="all", linger_ms=5
    )
    sent: Sent = {}
    try:
        producer.init_transactions()
        for start in range(0, len(samples), size):
            batch = samples[start : start + size]
            for part, commit in ((batch[:2], False), (batch, True)):
                producer.begin_transaction()
                pending = [producer.send(settings.topic, one.value, one.key, one.headers) for one in part]
                positions = [(metadata.partition, metadata.offset) for metadata in (one.get(300) for one in pending)]
                producer.commit_transaction() if commit else producer.abort_transaction()
                if commit:
                    sent |= zip(positions, map(Expected.of, part), strict=True)
    finally:
        producer.close(timeout=10)
    return sent


def wait_until(condition: Callable[[], bool], describe: Callable[[], str], timeout_s: float = TIMEOUT_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s:.0f} s: {describe()}"
        time.sleep(POLL_S)


def has_ended(pid: int) -> bool:
    """Whether a process has ended, although its parent may not have waited for it yet."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@dataclass
class Stream:
    """A process that runs the stream; `kill` is the protocol step and the batch number at which it kills itself."""

    settings: Settings
    images_per_batch: int = 2_000
    kill: tuple[str, int] | None = None
    until_drained: bool = False
    process: subprocess.Popen[bytes] = field(init=False)
    started_at: float = field(init=False)
    _log: Path = field(init=False)

    def __post_init__(self) -> None:
        self._log = self.settings.work_dir / f"driver-{uuid4().hex[:8]}.jsonl"
        self._log.touch()
        options = {"images_per_batch": self.images_per_batch, "until_drained": self.until_drained}
        spec = {
            "settings": self.settings.model_dump(mode="json"),
            "options": options,
            "log": str(self._log),
            "kill": self.kill,
        }
        self.started_at = time.time()
        with self._output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.faults.driver", json.dumps(spec)],
                cwd=CHECKOUT,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.running:
            self.kill_now()

    @property
    def _output(self) -> Path:
        return self._log.with_suffix(".out")

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def events(self, kind: str) -> list[dict[str, Any]]:
        """The events of one kind so far."""
        lines = self._log.read_text(encoding="utf-8").splitlines(keepends=True)
        events = [json.loads(line) for line in lines if line.endswith("\n")]
        return [event for event in events if event["event"] == kind]

    def log_tail(self) -> str:
        return f"{self._log.read_text(encoding='utf-8')[-3_000:]}\n{self._output.read_text(errors='replace')[-3_000:]}"

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Wait until a condition is met while the stream runs."""

        def met() -> bool:
            done = condition()
            assert done or self.running, f"the stream ended: {self.log_tail()}"
            return done

        wait_until(met, self.log_tail)

    def wait_started(self) -> None:
        self.wait_for(lambda: bool(self.events("start")))

    def wait_killed(self) -> float:
        """Wait until it has killed itself and its process group; returns the time."""
        code = self.process.wait(TIMEOUT_S)
        assert code == -signal.SIGKILL, f"not killed at {self.kill}: {self.log_tail()}"
        return time.time()

    def wait_ended(self) -> None:
        """Wait until it has ended with exit code 0, without a timeout."""
        assert self.process.wait() == 0, self.log_tail()

    def kill_now(self) -> float:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        return time.time()

    def stop(self) -> None:
        """Stop it as `docker stop` or a service manager does."""
        self.process.send_signal(signal.SIGTERM)
        self.wait_ended()


@dataclass
class Drained:
    """The reports of a stream in the test process."""

    batches: list[BatchResult] = field(default_factory=list)
    committed_at: list[float] = field(default_factory=list)
    troubles: list[str] = field(default_factory=list)
    refused: dict[int, str] = field(default_factory=dict)  # model version → reason
    restarts: int = 0
    ended: bool = False

    @property
    def rows(self) -> int:
        """The number of messages in committed batches."""
        return sum(batch.input_rows for batch in self.batches)

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Wait until a condition is met while the stream runs."""

        def met() -> bool:
            done = condition()
            assert done or not self.ended, f"the stream ended: {self.troubles}"
            return done

        wait_until(met, lambda: f"{self.rows} messages in committed batches, {self.troubles}")


def drain(
    settings: Settings,
    images_per_batch: int = 2_000,
    on_batch: Callable[[BatchResult], None] = lambda _: None,
    on_trouble: Callable[[str], None] = lambda _: None,
    payload: Payload = RAW,
) -> Drained:
    """Score all messages of the topic, in the Spark session of the tests.

    Raises:
        ServiceError: as the stream does.
    """
    drained = Drained()

    def note(batch: BatchResult) -> None:
        drained.batches.append(batch)
        on_batch(batch)

    def note_trouble(what: str) -> None:
        drained.troubles.append(what)
        on_trouble(what)

    events = StreamEvents(on_batch=note, on_trouble=note_trouble)
    options = StreamOptions(images_per_batch=images_per_batch, until_drained=True, payload=payload)
    _run_here(settings, options, events, drained)
    return drained


def stream_during(settings: Settings, actions: Callable[[Drained], None], images_per_batch: int = 2_000) -> Drained:
    """Run the stream in the Spark session of the tests and `actions` in another thread; then stop it by SIGTERM.

    Raises:
        ServiceError: as the stream does.
    """
    drained, started = Drained(), threading.Event()

    def note(batch: BatchResult) -> None:
        drained.committed_at.append(time.time())
        drained.batches.append(batch)

    def act() -> None:
        started.wait()
        try:
            actions(drained)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    events = StreamEvents(
        on_start=started.set,
        on_batch=note,
        on_refused=drained.refused.__setitem__,
        on_trouble=drained.troubles.append,
    )
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # in case that the stream ends before the actions
    try:
        with ThreadPoolExecutor(1) as pool:
            acting = pool.submit(act)
            try:
                _run_here(settings, StreamOptions(images_per_batch=images_per_batch), events, drained)
            finally:
                started.set()
        acting.result()
    finally:
        signal.signal(signal.SIGTERM, before)
    return drained


def _run_here(settings: Settings, options: StreamOptions, events: StreamEvents, drained: Drained) -> None:
    SPARK.start(settings.work_dir.parent, settings.jars_dir)
    try:
        drained.restarts = run_stream(settings, str(settings.bootstrap_servers), options, events).restarts
    finally:
        drained.ended = True


def rows(settings: Settings, sql: str) -> list[dict[str, Any]]:
    """Query the tables with deltalake only; tables in a bucket are copied first."""
    home = settings.place
    with TemporaryDirectory() as scratch:
        tables = Path(home.tables)
        if not home.is_local:
            tables = Path(scratch)
            keys = [stored.key for stored in home.store.list(TABLES_FOLDER)]
            copies = {key: tables / key.removeprefix(f"{TABLES_FOLDER}/") for key in keys}
            for folder in {copy.parent for copy in copies.values()}:
                folder.mkdir(parents=True, exist_ok=True)
            with ThreadPoolExecutor(16) as pool:
                list(pool.map(home.store.fetch, copies, copies.values()))
        builder = QueryBuilder()
        for path in tables.iterdir():
            builder = builder.register(path.name, DeltaTable(path))
        return pa.table(builder.execute(sql).read_all()).to_pylist()


def versions(settings: Settings) -> dict[str, int]:
    """The version of each table."""
    return {name: open_delta(settings.place.table(name)).version() for name in settings.place.table_names()}


def scored(settings: Settings) -> int:
    """The number of messages in complete batches."""
    if not settings.place.has_table("batches"):
        return 0
    return int(rows(settings, "SELECT coalesce(sum(input_rows), 0) AS n FROM batches")[0]["n"])


def check_exactly_once(settings: Settings, sent: Sent) -> None:
    """Every message sent has one row, in the correct table, with the correct reason and the model of its batch."""
    found = rows(
        settings,
        """
        SELECT "partition", "offset", batch_id, query_id, model_version, bundle_sha256, NULL AS reason, NULL AS sha256
        FROM predictions UNION ALL
        SELECT "partition", "offset", batch_id, query_id, model_version, bundle_sha256, reason, value_sha256
        FROM quarantine
        """,
    )
    counted = Counter((row["partition"], row["offset"]) for row in found)
    lost, unknown = sent.keys() - counted.keys(), counted.keys() - sent.keys()
    repeated = [position for position, n in counted.items() if n > 1]
    assert not lost, f"{len(lost)} of {len(sent)} messages lost: {sorted(lost)[:5]}"
    assert not repeated, f"{len(repeated)} messages repeated: {repeated[:5]}"
    assert not unknown, f"{len(unknown)} rows of messages that were not sent: {sorted(unknown)[:5]}"

    for row in found:
        expected = sent[row["partition"], row["offset"]]
        assert row["reason"] == expected.reason, f"{expected.kind}: {row}"
        assert row["reason"] is None or row["sha256"] == expected.sha256, f"{expected.kind}: other bytes"
    _check_models(settings, found)
    _check_features(settings, found)

    report = audit(settings)
    assert report.clean, [problem.text for problem in report.problems]
    assert report.predicted + report.quarantined == len(sent)
    assert not report.unfinished
    check_answers(settings)


def check_answers(settings: Settings) -> None:
    """A `read_committed` consumer finds each row exactly once in the answers topic, equal to that in the table."""
    if settings.answers_topic is None:
        return
    expected = Counter(
        _comparable(*answer_message(table, row))
        for table in TABLES_BY_SETTING[settings.answers]
        for row in rows(settings, f"SELECT * FROM {table}")  # noqa: S608  names of tables
    )
    found = Counter(_comparable(one.key, one.value, one.headers) for one in committed_answers(settings))
    assert found == expected, f"lost: {list(expected - found)[:3]}, unexpected: {list(found - expected)[:3]}"


def _comparable(key: bytes | None, value: bytes, headers: Iterable[tuple[str, bytes]]) -> tuple[object, ...]:
    return key, value, *sorted(headers)


def committed_answers(settings: Settings) -> list[Any]:
    """The committed messages of the answers topic, partition by partition."""
    servers = settings.answers_bootstrap_servers or settings.bootstrap_servers
    consumer = KafkaConsumer(bootstrap_servers=servers, isolation_level="read_committed")
    found: dict[TopicPartition, list[Any]] = {}
    try:
        topic = settings.answers_topic
        partitions = [TopicPartition(topic, number) for number in sorted(consumer.partitions_for_topic(topic) or ())]
        ends = consumer.end_offsets(partitions)
        consumer.assign(partitions)
        consumer.seek_to_beginning()
        wait_until(
            lambda: _take(consumer, found) and all(consumer.position(one) >= end for one, end in ends.items()),
            lambda: f"answers missing before {ends}",
        )
    finally:
        consumer.close()
    return [message for one in partitions for message in found.get(one, [])]


def _take(consumer: KafkaConsumer, into: dict[TopicPartition, list[Any]]) -> bool:
    for partition, messages in consumer.poll(timeout_ms=200).items():
        into.setdefault(partition, []).extend(messages)
    return True


def _check_models(settings: Settings, found: list[dict[str, Any]]) -> None:
    """Rows, `batches` and decisions agree on the model and the message count of each batch."""
    batches = {(row["query_id"], row["batch_id"]): row for row in rows(settings, "SELECT * FROM batches")}
    by_batch = Counter((row["query_id"], row["batch_id"]) for row in found)
    accounted = {batch: row["input_rows"] for batch, row in batches.items() if row["input_rows"]}  # else only holes
    assert by_batch == accounted, {key: (by_batch.get(key), accounted.get(key)) for key in by_batch | accounted}
    for row in found:
        batch = batches[row["query_id"], row["batch_id"]]
        assert (row["model_version"], row["bundle_sha256"]) == (batch["model_version"], batch["bundle_sha256"])
    for decision in decisions(settings):
        batch = batches[decision.stream, decision.number]
        assert asdict(decision.model) == {"version": batch["model_version"], "sha256": batch["bundle_sha256"]}
        assert [asdict(one) for one in decision.ranges] == batch["offsets"]


def decisions(settings: Settings) -> list[Decision]:
    """The decisions of the topic's stream, oldest first."""
    store = settings.place.store
    keys = sorted(stored.key for stored in store.list(f"streams/{settings.topic}/batches"))
    return [Decision.from_json(data, key) for key in keys if (data := store.get(key)) is not None]


def check_one_attempt(settings: Settings) -> None:
    """The rows of a batch are those of the files in its decision, with equal timestamps to the microsecond."""
    for name, made_at in (("predictions", "scored_at"), ("quarantine", "quarantined_at")):
        columns = ["partition", "offset", made_at]
        found: dict[tuple[str, int], list[str]] = defaultdict(list)
        for row in rows(settings, f'SELECT query_id, batch_id, "partition", "offset", {made_at} FROM {name}'):  # noqa: S608
            found[row["query_id"], row["batch_id"]].append(repr([row[column] for column in columns]))
        for decision in decisions(settings):
            stored = [settings.place.store.get(f"tables/{name}/{file.path}") for file in decision.files[name]]
            files = [pa.BufferReader(data) for data in stored if data is not None]
            written = [row for file in files for row in pq.read_table(file, columns=columns).to_pylist()]
            expected = sorted(repr([row[column] for column in columns]) for row in written)
            assert sorted(found[decision.stream, decision.number]) == expected, f"batch {decision.number}, {name}"


def _check_features(settings: Settings, found: list[dict[str, Any]]) -> None:
    """The features are those of the predicted messages."""
    features = rows(settings, 'SELECT "partition", "offset" FROM features WHERE topic IS NOT NULL')
    predicted = [(row["partition"], row["offset"]) for row in found if row["reason"] is None]
    assert sorted((row["partition"], row["offset"]) for row in features) == sorted(predicted)


def register_copy(settings: Settings) -> int:
    """Register version 1 again with another SHA-256: its answers are equal, but its rows can be distinguished."""
    registry = open_registry(settings.home)

    def copy(target: Path) -> None:
        registry.fetch(1, target)
        manifest = target / "manifest.json"
        spaces = " " * (len(registry.versions()) + 1)
        manifest.write_text(manifest.read_text().replace('"holdout_rows":', f'"holdout_rows":{spaces}', 1))

    return registry.register(copy)
