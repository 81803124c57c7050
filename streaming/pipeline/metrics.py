"""The stream's Prometheus metrics, and the HTTP server for them and for health checks.

Names follow prometheus.io/docs/practices/naming: base units, times as timestamps, versions as labels of an `_info`
metric, and labels over which a sum is meaningful: neither stages nor steps overlap.
"""

import json
import socket
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from math import nan
from typing import Any, Protocol
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector, make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer

from models.drift import MEANINGFUL_ROWS
from streaming.errors import ConfigurationError
from streaming.pipeline.answers_topic import AnswersState
from streaming.pipeline.offsets import PartitionLag

LOOPBACK = "127.0.0.1"
STOP_POLL_S = 0.1
SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)  # buckets
STEPS = ("plan", "score", "commit", "between")  # consecutive, by the driver's clock
TOTAL = "batch"  # plan + score + commit

Check = Callable[[], tuple[bool, str]]  # whether it passes, and the reason


class BatchFigures(Protocol):
    """The figures of a committed micro-batch, such as a `streaming.pipeline.commit.BatchResult`."""

    @property
    def batch_id(self) -> int: ...
    @property
    def model_version(self) -> int: ...
    @property
    def input_rows(self) -> int: ...
    @property
    def predicted_rows(self) -> int: ...
    @property
    def quarantined(self) -> Mapping[str, int]: ...
    @property
    def input_bytes(self) -> int: ...
    @property
    def seconds(self) -> Mapping[str, float]: ...
    @property
    def wall_s(self) -> float: ...
    @property
    def waited_s(self) -> Sequence[float]: ...
    @property
    def traced(self) -> Sequence[str]: ...
    @property
    def challenger_error(self) -> str | None: ...
    @property
    def drift(self) -> Mapping[str, float]: ...


# Drift figures of a batch, and of a window of batches → help text of the metric.
DRIFT_OF_BATCH = {
    "psi_max": "Largest population stability index of a component, against held-out images.",
    "psi_mean": "Mean population stability index of the components, against held-out images.",
    "psi_expected": "Population stability index expected of the same number of held-out images.",
    "mean_shift": "Shift of the components' means, in standard deviations.",
    "spread": "Spread of the components, as a multiple of that of held-out images.",
    "low_confidence": "Share of answers below the confidence of 90% of held-out images.",
}
DRIFT_OF_WINDOW = {
    "window_psi": "Population stability index of the last window of micro-batches.",
    "p_value": "p-value of the last window of micro-batches under no drift.",
    "alarm": "1 if the last window of micro-batches shows drift.",
}


class Metrics:
    """The metrics of one stream, in a separate registry."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        new: dict[str, Any] = {"namespace": "imagestream", "registry": self.registry}
        Info("build", "The installed release.", **new).info({"version": version("imagestream")})
        self._rows = Counter("rows", "Messages with a row in the tables.", ["outcome"], **new)
        self._bytes = Counter("input_bytes", "Bytes of the messages read.", **new)
        self._batches = Counter("batches", "Committed micro-batches.", **new)
        self._quarantined = Counter("quarantined", "Quarantined messages.", ["reason"], **new)
        new |= {"buckets": SECONDS}
        self._waited = Histogram(
            "publish_to_row_seconds", "Time from the message's timestamp to the commit of its prediction.", **new
        )
        self._batch = Histogram("batch_duration_seconds", "Time from a micro-batch's plan to its commit.", **new)
        self._step = Histogram(
            "step_duration_seconds", "Time of a step of a micro-batch; steps are consecutive.", ["step"], **new
        )
        self._stage = Histogram(
            "stage_duration_seconds",
            "Time of a stage of scoring a micro-batch, summed over the workers.",
            ["stage"],
            **new,
        )
        del new["buckets"]
        self._model = Gauge("model_info", "The model version of the last micro-batch.", ["version"], **new)
        self._drift = {
            figure: Gauge(f"drift_{figure}", text, **new) for figure, text in (DRIFT_OF_BATCH | DRIFT_OF_WINDOW).items()
        }
        for gauge in self._drift.values():
            gauge.set(nan)  # not known yet
        self._refused = Counter("refused_models", "Promoted versions that were rejected.", **new)
        self._challenger = Counter("challenger_failures", "Micro-batches in which the challenger failed.", **new)
        self._trouble = Counter("troubles", "Failures after which the stream tried again.", **new)
        self._lag = Gauge("lag_messages", "Messages without a row yet.", ["topic", "partition"], **new)
        self._broker = Gauge("broker_up", "1 if the broker answered the last request.", **new)
        self._broker.set(nan)  # not known yet
        self._last_batch = Gauge(
            "last_batch_timestamp_seconds", "Unix time of the last micro-batch, or of the start.", **new
        )
        self._last_batch.set_to_current_time()
        self._answers = Counter("answers", "Answers committed to the answers topic.", **new)
        self._answers_backlog = Gauge(
            "answers_backlog_messages", "Answers of a decided batch that are not committed yet.", **new
        )
        self._last_answers = Gauge(
            "last_answers_timestamp_seconds", "Unix time of the last transaction with answers.", **new
        )
        self._last_answers.set(nan)  # none yet
        self._answered_at: float | None = None
        for outcome in ("predicted", "quarantined"):
            self._rows.labels(outcome)  # a counter must start at 0 for its first rate to be right

    def batch(self, batch: BatchFigures) -> None:
        """Count a committed micro-batch."""
        self._last_batch.set_to_current_time()
        self._batches.inc()
        self._rows.labels("predicted").inc(batch.predicted_rows)
        self._rows.labels("quarantined").inc(sum(batch.quarantined.values()))
        self._bytes.inc(batch.input_bytes)
        self._model.clear()
        self._model.labels(str(batch.model_version)).set(1)
        self._challenger.inc(batch.challenger_error is not None)
        for reason, count in batch.quarantined.items():
            self._quarantined.labels(reason).inc(count)
        for seconds in batch.waited_s:
            self._waited.observe(seconds)
        self._batch.observe(batch.wall_s)
        for name, seconds in batch.seconds.items():
            if name in STEPS:
                self._step.labels(name).observe(seconds)
            elif name != TOTAL:
                self._stage.labels(name).observe(seconds)
        shown = DRIFT_OF_BATCH if batch.drift.get("rows", 0) >= MEANINGFUL_ROWS else {}
        for figure in (*shown, *DRIFT_OF_WINDOW):
            if figure in batch.drift:
                self._drift[figure].set(batch.drift[figure])

    def refused(self) -> None:
        """Count a promoted model version that was rejected."""
        self._refused.inc()

    def trouble(self) -> None:
        """Count a failure after which the stream tries again."""
        self._trouble.inc()

    def answers(self, sent: AnswersState) -> None:
        """Record the state of the answers topic."""
        self._answers_backlog.set(sent.backlog)
        if sent.at is not None and sent.at != self._answered_at:
            self._answered_at = sent.at
            self._answers.inc(sent.messages)
            self._last_answers.set(sent.at)

    def broker(self, partitions: Iterable[PartitionLag] | None) -> None:
        """Record the lag of each partition; None if the broker did not answer, so that the lag is unknown."""
        self._broker.set(partitions is not None)
        self._lag.clear()
        for one in partitions or ():
            if one.lag is not None:
                self._lag.labels(one.topic, str(one.partition)).set(one.lag)


class MetricsServer:
    """Serves `/metrics`, and health checks at paths such as `/livez`: 200 or 503 with `{"healthy": …, "reason": …}`.

    Args:
        checks: path → check.
        port: 0 for a free one.

    Raises:
        ServiceError: the address or port cannot be used.
    """

    def __init__(self, metrics: Metrics, checks: Mapping[str, Check], port: int, host: str = LOOPBACK) -> None:
        exposition: Any = make_wsgi_app(metrics.registry)

        def application(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
            path = environ["PATH_INFO"]
            if path == "/metrics":
                page: Iterable[bytes] = exposition(environ, start_response)
                return page
            check = checks.get(path)
            if check is None:
                start_response("404 Not Found", [("Content-Type", "text/plain")])
                return [f"expected {', '.join(checks)} or /metrics\n".encode()]
            healthy, reason = check()
            status = "200 OK" if healthy else "503 Service Unavailable"
            start_response(status, [("Content-Type", "application/json")])
            return [json.dumps({"healthy": healthy, "reason": reason}).encode() + b"\n"]

        try:
            family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
            server = type("_Server", (ThreadingWSGIServer,), {"address_family": family})
            self._server: WSGIServer = make_server(str(address[0]), port, application, server, _QuietHandler)
        except OSError as error:
            raise ConfigurationError(
                f"cannot serve metrics at {host}:{port} ({error.strerror}): choose another address of this machine, or "
                "another port (0 for a free one)"
            ) from error
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self._server.server_port}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(STOP_POLL_S,), name="metrics", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _QuietHandler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  its name in the base class
        """Scrapes every few seconds are not logged."""
