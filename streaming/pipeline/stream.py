"""The running stream: scores a Kafka topic in micro-batches until the topic is drained or the stream is stopped.

One loop starts the Spark query and restarts it when the broker comes back after an outage, when a worker or an
inference engine fails temporarily, when another driver has decided a batch, and when the size of the messages calls for
another batch size. Before each start, decided batches are completed, and the query begins where the tables end; its
checkpoint is a temporary folder. A permanent failure, such as lost offsets or a rejected model, ends the stream with
a one-line error.
"""

import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic, perf_counter
from typing import Any, Literal

from pyspark.sql import SparkSession

from producer.topic_files import file_stem
from streaming.errors import (
    ConfigurationError,
    ConflictError,
    ServiceError,
    StoreAwayError,
    UnavailableError,
    with_message,
)
from streaming.pipeline.answers_topic import AnswersState, AnswersTopic
from streaming.pipeline.bounded import TRIES, Attempts, read_bounded
from streaming.pipeline.commit import BatchCommitter, BatchResult, LostDecisionError
from streaming.pipeline.decisions import Decisions
from streaming.pipeline.finish import Tables, finish_decided
from streaming.pipeline.ingest import planned_ranges, read_topics
from streaming.pipeline.migrate import begin_stream, old_stream_lock, set_checkpoint_aside
from streaming.pipeline.model_manager import ModelManager
from streaming.pipeline.offsets import COMMITTED
from streaming.pipeline.payload import RAW, Payload
from streaming.pipeline.positions import Accept, OffsetPlan, TopicAppearedError, check_not_shared, plan_topics
from streaming.pipeline.preflight import check_memory, with_fixed_heap
from streaming.pipeline.reconcile import WitnessError
from streaming.pipeline.topic_snapshot import SnapshotReader
from streaming.platform.bounded_reader import BoundedReader
from streaming.platform.engines import Engines
from streaming.platform.kafka_probe import RefusedError
from streaming.platform.kafka_security import REDACTION, client_arguments, spark_options
from streaming.platform.session import cause, raised, spark_session
from streaming.platform.topic import Subscription, broker_problem, describe_topics, offsets_from, topic_notices
from streaming.registry import open_registry
from streaming.settings import Settings
from streaming.signals import stop_signals
from streaming.storage.home import make_dir, try_lock

IMAGES_PER_BATCH = 2_000  # from this size on, the fixed cost of a micro-batch is small compared with that of its images
BYTES_PER_BATCH = 512 * 1024**2
RESIZE_FACTOR = 2.0  # the batch size is changed only if it is off by more than this factor
TASKS_PER_CORE = 4  # per micro-batch; several small tasks balance partitions of unequal size
POLL_S = 0.2
STOP_TIMEOUT_S = 25.0
RETRY_S = 2.0
MAX_FAILURES = 3  # consecutive ones, without a committed batch in between
MAX_LOST = 3  # decisions in one run; one may be lost to a late write of a driver that has died


EARLIEST: Literal["earliest"] = "earliest"
LATEST: Literal["latest"] = "latest"
Begin = Literal["earliest", "latest"] | datetime


@dataclass(frozen=True)
class StreamOptions:
    """Options of a stream."""

    until_drained: bool = False
    images_per_batch: int = IMAGES_PER_BATCH
    bytes_per_batch: int = BYTES_PER_BATCH
    store_features: bool = True
    accept: Accept = field(default_factory=Accept)
    payload: Payload = RAW
    subscription: Subscription | None = None  # default: the settings' topic
    begin: Begin = EARLIEST  # where the first start begins: EARLIEST, LATEST or a time


@dataclass(frozen=True)
class StreamEvents:
    """Callbacks for events; they are called from the stream's own threads and must return quickly."""

    on_start: Callable[[], None] = lambda: None
    on_batch: Callable[[BatchResult], None] = lambda _: None
    on_step: Callable[[str], None] = lambda _: None
    on_answers: Callable[[AnswersState], None] = lambda _: None
    on_refused: Callable[[int, str], None] = lambda _version, _why: None
    on_trouble: Callable[[str], None] = lambda _: None
    on_notice: Callable[[str], None] = lambda _: None  # a warning without a failure
    on_idle: Callable[[], None] = lambda: None  # called repeatedly while there are no messages


@dataclass
class StreamSummary:
    """What one run of the stream did."""

    batches: int = 0
    input_rows: int = 0
    predicted: int = 0
    quarantined: dict[str, int] = field(default_factory=dict)
    predicted_by_version: dict[int, int] = field(default_factory=dict)
    restarts: int = 0  # of the Spark query, within this run
    seconds: float = 0.0  # from the start of the first query to the end of the last
    batch_seconds: float = 0.0  # the time spent in micro-batches

    def add(self, batch: BatchResult) -> None:
        self.batches += 1
        self.input_rows += batch.input_rows
        self.predicted += batch.predicted_rows
        self.batch_seconds += batch.wall_s
        for reason, count in batch.quarantined.items():
            self.quarantined[reason] = self.quarantined.get(reason, 0) + count
        of_version = self.predicted_by_version
        of_version[batch.model_version] = of_version.get(batch.model_version, 0) + batch.predicted_rows


class BatchSize:
    """The maximum number of messages in a micro-batch: the configured number, or fewer if messages are large."""

    def __init__(self, options: StreamOptions) -> None:
        self._options = options
        self.images = options.images_per_batch

    def fitting(self, batch: BatchResult) -> int:
        """The batch size for messages like those of `batch`."""
        mean_bytes = max(1, batch.input_bytes // max(1, batch.input_rows))
        return max(1, min(self._options.images_per_batch, self._options.bytes_per_batch // mean_bytes))

    def needs_resize(self, batch: BatchResult) -> bool:
        ratio = self.fitting(batch) / self.images
        return not 1 / RESIZE_FACTOR <= ratio <= RESIZE_FACTOR


def run_stream(
    settings: Settings, bootstrap_servers: str, options: StreamOptions, events: StreamEvents
) -> StreamSummary:
    """Score the topics of a stream until SIGTERM or Ctrl-C, or, with `until_drained`, until no message is left.

    Args:
        settings: their topic is the name of the stream.
        bootstrap_servers: Kafka's addresses, `HOST:PORT` separated by commas.
        options: what to read, and in which batches.

    Raises:
        ServiceError: another process runs this stream, another stream of the home reads one of its topics, no broker
            answers at the start, the answers topic cannot be used, there is no champion, the topic's offsets do not
            continue the committed ones, there is not enough memory, or the query fails repeatedly.
        ModelError: the champion's bundle is rejected.
    """
    settings.place.check()
    locks = make_dir(settings.work_dir / "locks")
    busy = f"another stream is running on topic {settings.topic!r} in {settings.home}; stop it first"
    lock = locks / f"stream-{file_stem(settings.topic)}.lock"
    answers = AnswersTopic(settings, options.accept.new_topic, events.on_answers)
    with try_lock(lock, busy), old_stream_lock(settings), stop_signals() as stop, closing(answers):
        answers.prepare(subscription_of(settings, options))
        planner = _Planner(settings, bootstrap_servers, options, answers)
        plan = planner.plan()
        answers.begin(plan.stream, plan.number)
        set_checkpoint_aside(settings)
        for notice in topic_notices(bootstrap_servers, plan.names, client_arguments(settings)):
            events.on_notice(notice)
        registry = open_registry(settings.home)
        settings, java_options = with_fixed_heap(settings)
        with spark_session(
            settings, f"imagestream {settings.topic}", java_options=java_options, conf=REDACTION
        ) as spark:
            models = ModelManager(spark, registry, events.on_refused, Engines(settings))
            if settings.master.startswith("local"):
                bundle_bytes = sum(len(content) for content in models.champion.broadcast.value.files.values())
                check_memory(settings, bundle_bytes, spark.sparkContext.defaultParallelism)
            loop = _QueryLoop(settings, bootstrap_servers, options, events, spark, stop)
            with closing(SnapshotReader(bootstrap_servers, client_arguments(settings))) as snapshots:
                committer = BatchCommitter(
                    models,
                    planner.tables,
                    Decisions(settings.place.store, settings.topic),
                    snapshots.take,
                    store_features=options.store_features,
                    payload=options.payload,
                    limits=settings.image_limits,
                    answers=answers,
                    on_batch=loop.committed,
                    on_step=events.on_step,
                )
                loop.run(committer, planner, plan)
    return loop.summary


class _Planner:
    """Plans where each query begins: completes decided batches, then compares Kafka with the tables."""

    def __init__(
        self, settings: Settings, bootstrap_servers: str, options: StreamOptions, answers: AnswersTopic
    ) -> None:
        self.tables = Tables(settings.place.tables)
        self._answers = answers
        self._settings = settings
        self._servers = bootstrap_servers
        self._accept = options.accept
        self._begin = options.begin
        self._subscription = subscription_of(settings, options)

    def plan(self) -> OffsetPlan:
        """The plan of the next query.

        Raises:
            ServiceError: a decided batch cannot be completed, or the topic does not continue the committed offsets; an
                UnavailableError if a broker or the store does not answer.
        """
        settings, client = self._settings, client_arguments(self._settings)
        positions = finish_decided(settings, settings.topic, self.tables, self._answers)
        try:
            topics = describe_topics(self._servers, self._subscription, client)
        except ConfigurationError:
            raise
        except ServiceError as error:  # also of a topic that does not exist, or not yet
            raise UnavailableError(str(error)) from error
        if positions is None:
            first = {}
            if self._begin != EARLIEST:
                when = None if self._begin == LATEST else self._begin
                first = offsets_from(self._servers, topics, when, settings.isolation == COMMITTED, client)
            reads = str(self._subscription)
            positions = begin_stream(settings, self.tables, topics, self._accept, first=first, reads=reads)
        elif new := [topic.name for topic in topics if positions.topic(topic.name) not in positions.topics]:
            check_not_shared(settings, new)
        return plan_topics(positions, topics, self._accept)


def subscription_of(settings: Settings, options: StreamOptions) -> Subscription:
    """The topics that the stream reads: those of the options, by default the settings' topic."""
    return options.subscription or Subscription((settings.topic,))


class _QueryLoop:
    """One run of the stream: the loop around the Spark query."""

    def __init__(
        self,
        settings: Settings,
        bootstrap_servers: str,
        options: StreamOptions,
        events: StreamEvents,
        spark: SparkSession,
        stop: threading.Event,
    ) -> None:
        self._settings = settings
        self._servers = bootstrap_servers
        self._options = options
        self._events = events
        self._spark = spark
        self._stop = stop
        self._client = client_arguments(settings)
        self._size = BatchSize(options)
        self._last: BatchResult | None = None
        self._failures = 0
        self._lost = 0
        self._attempts = Attempts(settings.work_dir / "attempts" / f"{file_stem(settings.topic)}.json")
        self._planned: set[str] | None = None  # the topics of the last plan that lacked one
        self._raised: Exception | None = None  # by the query's last micro-batch
        self.summary = StreamSummary()

    def committed(self, batch: BatchResult) -> None:
        """Record a committed micro-batch."""
        if batch.input_rows:  # a batch of transaction markers alone has no message sizes
            self._last = batch
        self._failures = 0
        self.summary.add(batch)
        self._events.on_batch(batch)

    def run(self, committer: BatchCommitter, planner: _Planner, plan: OffsetPlan) -> None:
        """Run the query, restarting it as often as necessary."""
        clock = perf_counter()
        committer.plan = plan
        while not self._stop.is_set():
            if not self._read_without_spark(committer):
                self._replan(committer, planner)
                continue
            with TemporaryDirectory(prefix="imagestream-", ignore_cleanup_errors=True) as scratch:
                query = self._start(committer, Path(scratch))
                if self.summary.restarts == 0:
                    self._events.on_start()
                error = self._wait(query)
            if error is None:
                break
            self.summary.restarts += 1
            if isinstance(error, _ResizeError) and self._last is not None:
                self._size.images = self._size.fitting(self._last)
                self._last = None
            elif not self._appeared(error, committer.plan):
                self._after_failure(error)
            self._replan(committer, planner)
        self.summary.seconds = perf_counter() - clock

    def _read_without_spark(self, committer: BatchCommitter) -> bool:
        """Read the next micro-batch in bounded memory, without Spark, if Spark has failed on it repeatedly.

        Returns:
            False if that failed as well.
        """
        from kafka.errors import KafkaError

        plan = committer.plan
        ranges = self._attempts.exhausted(plan.number + 1, plan.starts)
        if not ranges:
            return True
        self._events.on_trouble(
            f"batch {plan.number + 1} was started {TRIES} times and never finished: reading it message by message"
        )
        names = {name: in_kafka for name, (in_kafka, _) in plan.kafka_topics.items()}
        try:
            committed = self._settings.isolation == COMMITTED
            with closing(BoundedReader(self._servers, self._client, committed=committed)) as reader:
                committer(read_bounded(reader, ranges, names), ranges)
        except (KafkaError, ServiceError, LostDecisionError, WitnessError) as error:
            self._after_failure(error)
            return False
        return True

    def _appeared(self, error: Exception, plan: OffsetPlan) -> bool:
        """Whether the query failed because of a topic that the plan does not have yet."""
        before, self._planned = self._planned, {*plan.topics} if isinstance(error, TopicAppearedError) else None
        return self._planned is not None and self._planned != before

    def _replan(self, committer: BatchCommitter, planner: _Planner) -> None:
        """Plan the next query, waiting until brokers and store answer."""
        while not self._stop.is_set():
            try:
                committer.plan = planner.plan()
            except UnavailableError as error:  # a restart, or a full disk
                self._events.on_trouble(f"{error}; trying again")
                self._stop.wait(RETRY_S)
            else:
                return

    def _start(self, committer: BatchCommitter, scratch: Path) -> Any:
        plan = committer.plan

        def run_batch(messages: Any, batch: int) -> None:
            if self._last is not None and self._size.needs_resize(self._last):
                raise _ResizeError
            ranges = planned_ranges(scratch, batch, plan.names)
            self._attempts.begin(plan.number + 1, ranges)
            committer(messages, ranges)

        def keep_error(messages: Any, batch: int) -> None:
            try:
                run_batch(messages, batch)
            except Exception as error:
                self._raised = error  # of which the query's own exception has the text alone
                raise

        self._raised = None
        messages = read_topics(
            self._spark,
            self._servers,
            subscription_of(self._settings, self._options),
            images_per_batch=self._size.images,
            starting_offsets=plan.starting_offsets(),
            isolation=self._settings.isolation,
            client=spark_options(self._settings),
        )
        trigger: dict[str, Any] = {"processingTime": "0 seconds"}
        if self._options.until_drained:
            trigger = {"availableNow": True}
        # Each task writes a file to each table, so a task reads several partitions if the topic has hundreds.
        messages = messages.coalesce(TASKS_PER_CORE * self._spark.sparkContext.defaultParallelism)
        writer = messages.writeStream.queryName(self._settings.topic).foreachBatch(keep_error)
        # A file URI, since only the driver uses it, and Spark's default file system may be a remote one.
        return writer.option("checkpointLocation", scratch.as_uri()).trigger(**trigger).start()

    def _wait(self, query: Any) -> Exception | None:
        """Wait until the query ends; when the stream is stopped, let the running micro-batch finish.

        Returns:
            The error of the query; None if it did not fail.
        """
        while query.isActive and not self._stop.wait(POLL_S):
            if not query.status["isTriggerActive"]:
                self._events.on_idle()
        if self._stop.is_set():
            give_up = monotonic() + STOP_TIMEOUT_S
            while query.isActive and query.status["isTriggerActive"] and monotonic() < give_up:
                threading.Event().wait(POLL_S)
            query.stop()
        error = query.exception()
        return None if error is None or self._stop.is_set() else raised(self._raised or error)

    def _after_failure(self, error: Exception) -> None:
        """Wait if a broker or store is unavailable; otherwise allow a limited number of retries.

        Raises:
            ServiceError: of the type of `error` if it is permanent; or there were too many failures.
        """
        if isinstance(error, LostDecisionError):
            self._lost += 1
            if self._lost >= MAX_LOST:
                raise ConflictError(
                    f"another stream is running on topic {self._settings.topic!r} in {self._settings.home}: it decided "
                    f"{self._lost} batches before this one did; stop one of them"
                )
            self._events.on_trouble(f"planning again: {cause(error)}")
            return
        if may_return(error, local=self._settings.place.is_local):
            self._events.on_trouble(f"{cause(error)}; waiting for it")
            self._stop.wait(RETRY_S)  # the next plan, or the same micro-batch, tries again until it answers
            return
        if isinstance(error, ServiceError) and is_permanent(error):
            raise with_message(error, f"the stream stopped: {error}") from error
        if trouble := broker_problem(self._servers, self._client):
            self._events.on_trouble(f"{trouble}; waiting for it")
            while not self._stop.wait(RETRY_S) and broker_problem(self._servers, self._client):
                pass
            return
        self._failures += 1
        if self._failures >= MAX_FAILURES:
            raise ServiceError(f"the stream failed {self._failures} times in a row: {cause(error)}") from error
        if self._failures > 1:  # the batch may be too large; an undecided batch may be planned in another size
            self._size.images = max(1, self._size.images // 2)
        self._events.on_trouble(f"trying again: {cause(error)}")
        self._stop.wait(RETRY_S)


class _ResizeError(Exception):
    """Raised before a micro-batch is scored, to restart the query with another batch size."""


def may_return(error: Exception, *, local: bool) -> bool:
    """Whether to wait without a limit. A local store that fails is more likely full than temporarily unavailable."""
    return isinstance(error, UnavailableError) and not (local and isinstance(error, StoreAwayError))


def is_permanent(error: ServiceError) -> bool:
    """Whether a retry cannot help. A broker that has just started may deny what it allows a moment later."""
    return not isinstance(error, UnavailableError | RefusedError)
