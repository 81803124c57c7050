"""The running stream: a Kafka topic scored in micro-batches until it is drained or told to stop."""

import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import monotonic, perf_counter
from typing import Any

from models.registry import Registry
from streaming.commit import BatchCommitter, BatchResult
from streaming.errors import ServiceError
from streaming.ingest import ensure_topic, read_topic
from streaming.session import QUICK_START, spark_session
from streaming.settings import Settings

IMAGES_PER_BATCH = 2_000  # the size from which a micro-batch costs little beyond its images
POLL_S = 0.2
STOP_TIMEOUT_S = 25.0


@dataclass
class StreamSummary:
    """What one run of the stream did."""

    batches: int = 0
    input_rows: int = 0
    predicted: int = 0
    quarantined: dict[str, int] = field(default_factory=dict)
    predicted_by_version: dict[int, int] = field(default_factory=dict)
    seconds: float = 0.0  # from the query's start to its end
    batch_seconds: float = 0.0  # of the micro-batches alone

    def add(self, batch: BatchResult) -> None:
        self.batches += 1
        self.input_rows += batch.input_rows
        self.predicted += batch.predicted_rows
        self.batch_seconds += batch.wall_s
        for reason, count in batch.quarantined.items():
            self.quarantined[reason] = self.quarantined.get(reason, 0) + count
        of_version = self.predicted_by_version
        of_version[batch.model_version] = of_version.get(batch.model_version, 0) + batch.predicted_rows


def run_stream(
    settings: Settings,
    bootstrap_servers: str,
    *,
    until_drained: bool = False,
    images_per_batch: int = IMAGES_PER_BATCH,
    store_features: bool = True,
    on_start: Callable[[], None] = lambda: None,
    on_batch: Callable[[BatchResult], None] = lambda _: None,
    on_refused: Callable[[int, str], None] = lambda _version, _why: None,
) -> StreamSummary:
    """Score the settings' topic until SIGTERM or Ctrl-C, or, with `until_drained`, until what is there now is scored.

    Args:
        on_start: called once the query runs.
        on_batch: called after every committed micro-batch.
        on_refused: called with version and reason when a promoted model is refused; the old one goes on.

    Raises:
        ServiceError: no broker, no champion model, or the query failed.
        ModelError: the champion's bundle is refused.
    """
    checkpoint = settings.checkpoints_dir / settings.topic / "spark"
    summary = StreamSummary()

    def committed(batch: BatchResult) -> None:
        summary.add(batch)
        on_batch(batch)

    ensure_topic(bootstrap_servers, settings.topic)
    with (
        spark_session(settings, f"imagestream {settings.topic}", java_options=QUICK_START) as spark,
        _stop_signals() as stop,
    ):
        committer = BatchCommitter(
            spark,
            Registry(settings.models_dir),
            settings.tables_dir,
            checkpoint,
            store_features=store_features,
            on_batch=committed,
            on_refused=on_refused,
        )
        writer = (
            read_topic(spark, bootstrap_servers, settings.topic, images_per_batch)
            .writeStream.queryName(settings.topic)
            .foreachBatch(committer)
            .option("checkpointLocation", str(checkpoint))
        )
        clock = perf_counter()
        trigger: dict[str, Any] = {"availableNow": True} if until_drained else {"processingTime": "0 seconds"}
        query = writer.trigger(**trigger).start()
        on_start()
        _wait(query, stop)
        summary.seconds = perf_counter() - clock
    return summary


def _wait(query: Any, stop: threading.Event) -> None:
    """Wait until the query ends by itself or a signal asks it to; then let the running micro-batch finish."""
    while query.isActive and not stop.wait(POLL_S):
        pass
    if stop.is_set():
        give_up = monotonic() + STOP_TIMEOUT_S
        while query.isActive and query.status["isTriggerActive"] and monotonic() < give_up:
            threading.Event().wait(POLL_S)
        query.stop()
    error = query.exception()
    if error is not None:
        raise ServiceError(f"the stream failed: {_cause(str(error))}")


def _cause(text: str) -> str:
    """What a Spark error is about: the innermost Python error in it, else its first line."""
    errors = re.findall(r"^(?:[\w.]+\.)?(\w+(?:Error|Exception)): (.+)$", text, re.MULTILINE)
    if not errors:
        return text.strip().split("\n", 1)[0] or "no reason given"
    kind, message = errors[-1]
    return str(message) if kind in {"ServiceError", "ModelError"} else f"{kind}: {message}"


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set, for as long as the block runs."""
    stop = threading.Event()
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
