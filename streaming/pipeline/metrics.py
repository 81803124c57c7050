"""What the stream shows to Prometheus, and the small HTTP server on loopback that serves it beside `/healthz`."""

import json
import threading
from collections.abc import Callable, Iterable, Mapping
from math import nan
from time import time
from typing import Any, Protocol
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer

from models.drift import MEANINGFUL_ROWS
from streaming.errors import ServiceError
from streaming.pipeline.offsets import PartitionLag

LOOPBACK = "127.0.0.1"
STOP_POLL_S = 0.1
STAGE_BUCKETS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Batch(Protocol):
    """What is reported of a committed micro-batch; `streaming.pipeline.commit.BatchResult` is one."""

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
    def drift(self) -> Mapping[str, float]: ...


DRIFT_FIGURES = ("psi_max", "psi_mean", "psi_expected", "mean_shift", "spread", "low_confidence")  # of a batch
WINDOW_FIGURES = ("window_psi", "p_value", "alarm")  # of a window of batches


class Metrics:
    """The metrics of one stream, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        new: dict[str, Any] = {"namespace": "imagestream", "registry": self.registry}
        self._rows = Counter("rows", "Messages with a row in the tables.", ["outcome"], **new)
        self._bytes = Counter("input_bytes", "Bytes of the messages read.", **new)
        self._batches = Counter("batches", "Committed micro-batches.", **new)
        self._quarantined = Counter("quarantined", "Quarantined messages.", ["reason"], **new)
        self._stage = Histogram(
            "stage_seconds", "Seconds a micro-batch spent.", ["stage"], buckets=STAGE_BUCKETS, **new
        )
        self._version = Gauge("model_version", "Model version of the last micro-batch.", **new)
        self._drift = Gauge("drift", "Distance of the last images from held-out ones.", ["figure"], **new)
        self._refused = Counter("refused_models", "Promoted versions that were refused.", **new)
        self._trouble = Counter("troubles", "Failures after which the stream tried again.", **new)
        self._lag = Gauge("lag_messages", "Messages that wait for their row.", ["topic", "partition"], **new)
        self._broker = Gauge("broker_up", "1 if the broker answered when last asked.", **new)
        self._broker.set(nan)  # not asked yet
        self._last_batch = time()
        age = Gauge("batch_age_seconds", "Seconds since the last micro-batch, or since the start.", **new)
        age.set_function(lambda: time() - self._last_batch)
        for outcome in ("predicted", "quarantined"):
            self._rows.labels(outcome)  # a rate needs its zero

    def batch(self, batch: Batch) -> None:
        """Count a committed micro-batch."""
        self._last_batch = time()
        self._batches.inc()
        self._rows.labels("predicted").inc(batch.predicted_rows)
        self._rows.labels("quarantined").inc(sum(batch.quarantined.values()))
        self._bytes.inc(batch.input_bytes)
        self._version.set(batch.model_version)
        for reason, count in batch.quarantined.items():
            self._quarantined.labels(reason).inc(count)
        for stage, seconds in batch.seconds.items():
            self._stage.labels(stage).observe(seconds)
        shown = DRIFT_FIGURES if batch.drift.get("rows", 0) >= MEANINGFUL_ROWS else ()
        for figure in (*shown, *WINDOW_FIGURES):
            if figure in batch.drift:
                self._drift.labels(figure).set(batch.drift[figure])

    def refused(self) -> None:
        """Count a promoted model version that was refused."""
        self._refused.inc()

    def trouble(self) -> None:
        """Count a failure after which the stream tries again."""
        self._trouble.inc()

    def broker(self, partitions: Iterable[PartitionLag] | None) -> None:
        """What the broker said about the topics, None if it did not answer; the lag is unknown then."""
        self._broker.set(partitions is not None)
        self._lag.clear()
        for one in partitions or ():
            if one.lag is not None:
                self._lag.labels(one.topic, str(one.partition)).set(one.lag)


class MetricsServer:
    """Serves `/metrics`, and `/healthz`: 200 or 503 with `{"healthy": …, "reason": …}`."""

    def __init__(
        self, metrics: Metrics, health: Callable[[], tuple[bool, str]], port: int, host: str = LOOPBACK
    ) -> None:
        exposition: Any = make_wsgi_app(metrics.registry)

        def application(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
            path = environ["PATH_INFO"]
            if path == "/metrics":
                page: Iterable[bytes] = exposition(environ, start_response)
                return page
            if path != "/healthz":
                start_response("404 Not Found", [("Content-Type", "text/plain")])
                return [b"there are /metrics and /healthz\n"]
            healthy, reason = health()
            status = "200 OK" if healthy else "503 Service Unavailable"
            start_response(status, [("Content-Type", "application/json")])
            return [json.dumps({"healthy": healthy, "reason": reason}).encode() + b"\n"]

        try:
            self._server: WSGIServer = make_server(host, port, application, ThreadingWSGIServer, _Silent)
        except OSError as error:
            raise ServiceError(
                f"metrics cannot be served at {host}:{port} ({error.strerror}): give another port, or 0 for a free one"
            ) from error
        self.url = f"http://{host}:{self._server.server_port}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(STOP_POLL_S,), name="metrics", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Silent(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  its name in the base class
        """A scrape every few seconds is no news."""
