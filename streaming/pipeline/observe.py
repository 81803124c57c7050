"""Observability of a running stream: a log line per micro-batch, metrics, health checks and a state object.

`run_stream` reports to an `Observer`, which never handles a message, so no image can reach a log. The state object
`streams/<topic>/state.json` in the home says which process streams the topic, its phase and its last heartbeat. Readers
trust it only while that process is alive, or, if it runs on another machine, while the heartbeat is recent.
"""

import json
import os
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from importlib import import_module
from platform import node
from time import time
from typing import Any, TextIO

import psutil

from streaming.errors import ServiceError
from streaming.pipeline.answers_topic import AnswersState
from streaming.pipeline.decisions import TopicPartition
from streaming.pipeline.metrics import LOOPBACK, BatchFigures, Check, Metrics, MetricsServer
from streaming.pipeline.offsets import TopicOffsets, lags
from streaming.pipeline.positions import committed_ends, name_in_kafka
from streaming.platform.kafka_security import client_arguments
from streaming.settings import Settings
from streaming.tracing import scored

STALE_AFTER_S = 300.0  # the longest time that a micro-batch may take; an idle stream sends heartbeats more often
STATE_EVERY_S = 5.0
PROBE_EVERY_S = 10.0
CLOSE_TIMEOUT_S = 1.0


class Phase(StrEnum):
    """The phase of a stream."""

    STARTING = "starting"
    RUNNING = "running"
    FAILED = "failed"
    ENDED = "ended"


@dataclass(frozen=True)
class StreamState:
    """The content of `state.json`: the last process that streamed the topic. Times are seconds since 1970."""

    pid: int
    started: float  # start time of the process, since process ids are reused
    phase: Phase
    seen: float  # the last heartbeat: a micro-batch, or a poll without messages
    reason: str = ""  # why it failed
    model_version: int | None = None  # of its last micro-batch
    url: str | None = None  # of metrics and health checks
    host: str = field(default_factory=node)
    answers: AnswersState | None = None  # the state of the answers topic, if there is one

    @property
    def alive(self) -> bool:
        """Whether that process is still running and streaming."""
        if self.phase in {Phase.FAILED, Phase.ENDED}:
            return False
        if self.host != node():
            return time() - self.seen < STALE_AFTER_S
        try:
            process = psutil.Process(self.pid)
            return abs(process.create_time() - self.started) < 1 and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False

    def health(self, stale_after_s: float = STALE_AFTER_S) -> tuple[bool, str]:
        """Whether the query is active and its last heartbeat is at most `stale_after_s` seconds old; and the reason."""
        if self.phase is Phase.FAILED:
            return False, f"the stream failed: {self.reason}"
        if self.phase is Phase.ENDED:
            return False, "the stream has ended"
        if not self.alive:
            return False, f"process {self.pid} of the stream no longer exists"
        if self.phase is Phase.STARTING:
            return False, "the stream is starting"
        silent_s = time() - self.seen
        if silent_s > stale_after_s:
            return False, f"no micro-batch and no idle poll for {silent_s:.0f} s"
        return True, "streaming"


def state_key(settings: Settings) -> str:
    """The key of the state of the topic's stream in the home's store."""
    return f"streams/{settings.topic}/state.json"


def read_state(settings: Settings) -> StreamState | None:
    """The state of the last stream of the settings' topic; None if there was none, or the object is damaged."""
    try:
        content = json.loads(settings.place.store.get(state_key(settings)) or b"")
        answers = content.get("answers")
        parsed = {"phase": Phase(content["phase"]), "answers": AnswersState(**answers) if answers else None}
        return StreamState(**content | parsed)
    except (AttributeError, ServiceError, ValueError, TypeError, KeyError):  # never started, or damaged
        return None


def write_state(settings: Settings, state: StreamState) -> None:
    """Replace the state."""
    settings.place.store.put(state_key(settings), json.dumps(asdict(state)).encode() + b"\n")


class LogFormat(StrEnum):
    """The format of the log."""

    JSON = "json"
    TEXT = "text"


def open_log(format_: LogFormat | str = LogFormat.TEXT, stream: TextIO | None = None) -> Any:
    """A structlog logger that writes one line per event to `stream`, by default standard error."""
    import structlog

    stream = stream or sys.stderr
    as_json = LogFormat(format_) is LogFormat.JSON
    render: Any = structlog.processors.JSONRenderer() if as_json else _as_text
    stamp = structlog.processors.TimeStamper(fmt="iso" if as_json else "%Y-%m-%d %H:%M:%S", utc=as_json)
    return structlog.wrap_logger(
        structlog.WriteLogger(stream), processors=[structlog.processors.add_log_level, stamp, render]
    )


def _as_text(_logger: object, _method: str, event: Mapping[str, Any]) -> str:
    """`2026-03-01 12:00:00 batch input=63 …`, always on one line."""
    fields = {key: value for key, value in event.items() if key not in {"timestamp", "event", "level"}}
    level = "" if event["level"] == "info" else f"{event['level']}: "
    text = " ".join(f"{key}={json.dumps(value, default=str)}" for key, value in fields.items())
    return f"{event['timestamp']} {level}{event['event']} {text}".rstrip()


class Observer:
    """Receives the events of `run_stream`. It is thread-safe, and its own failures never fail a batch.

    A background thread asks the broker for the topic's end every `probe_every_s` seconds, so that lag and the broker's
    state are known even if there are no micro-batches.

    Args:
        log: from `open_log`; None logs nothing.
        metrics_port: the port for /metrics, /livez and /readyz, 0 for a free one; None serves nothing.
        host: the address to serve them at, by default loopback.
        stale_after_s: the maximum age of a heartbeat for health.
        probe_every_s: the interval between two requests to the broker.

    Raises:
        ServiceError: the address or port cannot be used.
    """

    def __init__(
        self,
        settings: Settings,
        bootstrap_servers: str,
        *,
        log: Any = None,
        metrics_port: int | None = None,
        host: str = LOOPBACK,
        stale_after_s: float = STALE_AFTER_S,
        probe_every_s: float = PROBE_EVERY_S,
    ) -> None:
        self.metrics = Metrics()
        self._settings = settings
        self._log = log
        self._stale_after_s = stale_after_s
        self._lock = threading.Lock()
        self._written = 0.0
        self._advanced = threading.Event()  # since the tables were last read for the lag
        self._advanced.set()
        self._lag: int | None = None
        self._challenger_error: str | None = None  # in the last micro-batch
        self._broker_answers: bool | None = None  # None before the first request
        self._state = StreamState(os.getpid(), psutil.Process().create_time(), Phase.STARTING, time())
        self._server = None
        if metrics_port is not None:
            self._server = MetricsServer(self.metrics, self._checks(), metrics_port, host)
            self._state = replace(self._state, url=self._server.url)
        self._closing = threading.Event()
        # kafka-python has circular imports: if two threads import it at the same time, both fail.
        import_module("kafka")
        self._probe = threading.Thread(
            target=self._watch_broker, args=(bootstrap_servers, probe_every_s), name="lag", daemon=True
        )
        self._probe.start()

    @property
    def url(self) -> str | None:
        """The URL of metrics and health checks; None if they are not served."""
        return self._state.url

    def health(self) -> tuple[bool, str]:
        """Whether the query is active and sends heartbeats, and the reason: /healthz."""
        return self._state.health(self._stale_after_s)

    def live(self) -> tuple[bool, str]:
        """Whether the process works or is still starting, so that a restart would not help, and the reason: /livez."""
        starting = self._state.phase is Phase.STARTING
        return (True, "the stream is starting") if starting else self.health()

    def ready(self) -> tuple[bool, str]:
        """Whether the query is active and the broker answers, and the reason: /readyz."""
        healthy, reason = self.health()
        return (False, "the broker does not answer") if healthy and self._broker_answers is False else (healthy, reason)

    def _checks(self) -> dict[str, Check]:
        return {"/livez": self.live, "/readyz": self.ready, "/healthz": self.health}

    def on_start(self) -> None:
        """The query is running."""
        self._update_state(phase=Phase.RUNNING, write=True)
        self._emit("info", "start", topic=self._settings.topic, pid=os.getpid(), metrics=self.url)

    def on_batch(self, batch: BatchFigures) -> None:
        """A micro-batch was committed."""
        self._advanced.set()
        self.metrics.batch(batch)
        news = batch.model_version != self._state.model_version or self._is_old
        self._update_state(phase=Phase.RUNNING, model_version=batch.model_version, write=news)
        self._emit(
            "info",
            "batch",
            topic=self._settings.topic,
            batch_id=batch.batch_id,
            model_version=batch.model_version,
            input=batch.input_rows,
            predicted=batch.predicted_rows,
            quarantined=dict(batch.quarantined),
            bytes=batch.input_bytes,
            seconds={stage: round(spent, 4) for stage, spent in batch.seconds.items()},
            wall_s=round(batch.wall_s, 4),
            images_per_second=round(batch.input_rows / max(batch.wall_s, 1e-9), 1),
            lag=self._lag,
        )

        scored(batch.traced, batch.wall_s, {"batch_id": batch.batch_id, "model_version": batch.model_version})
        if batch.challenger_error not in {None, self._challenger_error}:  # not again with every micro-batch
            self._emit("warning", "challenger failed", batch_id=batch.batch_id, reason=batch.challenger_error)
        self._challenger_error = batch.challenger_error
        if batch.drift.get("alarm"):
            figures = ("p_value", "window_psi", "window_rows")
            self._emit("warning", "drift", model_version=batch.model_version, **{f: batch.drift[f] for f in figures})

    def on_answers(self, sent: AnswersState) -> None:
        """Answers are to be sent, or were sent."""
        self.metrics.answers(sent)
        self._update_state(answers=sent, write=self._state.phase is Phase.RUNNING and self._is_old)

    def on_refused(self, version: int, why: str) -> None:
        """A promoted model was rejected; the stream continues with the previous one."""
        self.metrics.refused()
        self._emit("warning", "model refused", model_version=version, reason=why)

    def on_trouble(self, what: str) -> None:
        """A temporary failure; the stream tries again."""
        self.metrics.trouble()
        self._emit("warning", "trouble", reason=what)

    def on_notice(self, what: str) -> None:
        """A warning without a failure."""
        self._emit("warning", "notice", what=what)

    def on_idle(self) -> None:
        """The query is waiting for messages; cheap enough to be called at every poll."""
        self._update_state(write=self._state.phase is Phase.RUNNING and self._is_old)

    def on_failure(self, error: str) -> None:
        """The query failed; health checks report it from now on."""
        # Before the query runs, the state may be that of another process that streams this topic, and a failure is
        # reported to the caller directly.
        running = self._state.phase is Phase.RUNNING
        self._update_state(phase=Phase.FAILED, reason=error, write=running)
        if running:
            self._emit("error", "failed", topic=self._settings.topic, reason=error)

    def close(self) -> None:
        """The stream has ended: record it in the state object, and stop serving."""
        self._closing.set()
        if self._state.phase is Phase.RUNNING:
            self._update_state(phase=Phase.ENDED, write=True)
            self._emit("info", "end", topic=self._settings.topic)
        self._probe.join(CLOSE_TIMEOUT_S)  # a broker that does not answer must not delay the end
        if self._server is not None:
            self._server.close()

    @property
    def _is_old(self) -> bool:
        return time() - self._written >= STATE_EVERY_S

    def _update_state(self, *, write: bool, **changes: Any) -> None:
        with self._lock:
            self._state = replace(self._state, seen=time(), **changes)
            if write:
                self._written = self._state.seen
                with suppress(ServiceError):  # a full disk must not fail a batch because of this object
                    write_state(self._settings, self._state)

    def _emit(self, level: str, event: str, **fields: Any) -> None:
        if self._log is not None:
            with suppress(OSError):  # nor must a closed log
                getattr(self._log, level)(event, **fields)

    def _watch_broker(self, bootstrap_servers: str, every_s: float) -> None:
        settings = self._settings
        client = client_arguments(settings)
        offsets: TopicOffsets | None = None
        committed: dict[TopicPartition, int] = {}
        topics: list[str] = []
        while not self._closing.is_set():
            if self._advanced.is_set():
                self._advanced.clear()
                with suppress(ServiceError):  # if the tables cannot be read at the moment, keep the last lag
                    by_topic = committed_ends(settings)
                    committed = {partition: end for ends in by_topic.values() for partition, end in ends.items()}
                    if topics != [name_in_kafka(one) for one in by_topic] or offsets is None:
                        if offsets is not None:
                            offsets.close()
                        topics = [name_in_kafka(one) for one in by_topic]
                        offsets = TopicOffsets(bootstrap_servers, topics, client, settings.isolation)
            found = None if offsets is None else offsets.read()
            partitions = None if found is None else lags(committed, found)
            self._lag = None if partitions is None else sum(one.lag or 0 for one in partitions)
            self._broker_answers = partitions is not None
            self.metrics.broker(partitions)
            self._closing.wait(every_s)
        if offsets is not None:
            offsets.close()
