"""Log, metrics, health and state file of a running stream, over real HTTP."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from math import isnan
from pathlib import Path

import psutil
import pytest

from streaming.errors import ServiceError
from streaming.pipeline import offsets
from streaming.pipeline.answers_topic import AnswersState
from streaming.pipeline.observe import LogFormat, Observer, Phase, StreamState, open_log, read_state, write_state
from streaming.pipeline.offsets import PartitionLag
from streaming.settings import Settings
from tests.conftest import command_here
from tests.streaming.history import commit_batch, new_topic

NO_BROKER = "127.0.0.1:1"  # no broker listens here


@dataclass(frozen=True)
class Batch:
    """A micro-batch as `streaming.pipeline.commit` reports it."""

    batch_id: int = 7
    model_version: int = 3
    input_rows: int = 100
    input_bytes: int = 5000
    predicted_rows: int = 97
    quarantined: dict[str, int] = field(default_factory=lambda: {"empty": 2, "truncated": 1})
    seconds: dict[str, float] = field(
        default_factory=lambda: {"decode": 0.5, "backbone": 1.5, "plan": 0.1, "score": 1.7, "commit": 0.2, "batch": 2.0}
    )
    wall_s: float = 2.0
    waited_s: tuple[float, ...] = (0.5, 2.0, 400.0)
    traced: tuple[str, ...] = ()
    challenger_error: str | None = None
    drift: dict[str, float] = field(
        default_factory=lambda: {
            "rows": 97.0,
            "psi_max": 0.3,
            "psi_mean": 0.1,
            "mean_shift": 0.5,
            "spread": 1.1,
            "low_confidence": 0.2,
        }
    )


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path, topic="images")


@pytest.fixture(autouse=True)
def short_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offsets, "TIMEOUT_MS", 100)


@pytest.fixture
def log() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def observer(settings: Settings, log: io.StringIO) -> Iterator[Observer]:
    observer = Observer(settings, NO_BROKER, log=open_log(LogFormat.JSON, log), metrics_port=0)
    yield observer
    observer.close()


def get(observer: Observer, path: str) -> tuple[int, str]:
    assert observer.url
    try:
        with urllib.request.urlopen(observer.url + path, timeout=10) as answer:  # noqa: S310
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def metrics(observer: Observer) -> dict[str, float]:
    lines = [line for line in get(observer, "/metrics")[1].splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_batch_is_logged_as_one_json_line(observer: Observer, log: io.StringIO) -> None:
    observer.on_start()
    observer.on_batch(Batch())
    line = json.loads(log.getvalue().splitlines()[1])
    assert line.pop("timestamp").endswith("Z")
    assert line == {
        "event": "batch",
        "level": "info",
        "topic": "images",
        "batch_id": 7,
        "model_version": 3,
        "input": 100,
        "predicted": 97,
        "quarantined": {"empty": 2, "truncated": 1},
        "bytes": 5000,
        "seconds": Batch().seconds,
        "wall_s": 2.0,
        "images_per_second": 50.0,
        "lag": None,
    }


def test_drift_metrics_need_enough_images(observer: Observer) -> None:
    observer.on_batch(Batch())
    assert isnan(metrics(observer)["imagestream_drift_psi_max"])
    observer.on_batch(replace(Batch(), drift=Batch().drift | {"rows": 500.0}))
    assert metrics(observer)["imagestream_drift_psi_max"] == 0.3
    assert metrics(observer)["imagestream_drift_low_confidence"] == 0.2


def test_drift_window_metrics_are_independent_of_the_batch_size(observer: Observer) -> None:
    window = {"window_rows": 520.0, "window_psi": 0.4, "p_value": 1e-9, "p_limit": 3e-5, "alarm": 1.0}
    observer.on_batch(replace(Batch(), drift=Batch().drift | {"rows": 20.0} | window))
    found = {name: value for name, value in metrics(observer).items() if "_drift_" in name and not isnan(value)}
    assert found == {f"imagestream_drift_{name}": window[name] for name in ("window_psi", "p_value", "alarm")}


def test_answers_topic_is_in_metrics_state_and_status(observer: Observer, settings: Settings) -> None:
    observer.on_start()
    last = AnswersState("answers", 7, time.time(), messages=40)
    for sent in (AnswersState("answers", 6), AnswersState("answers", 6, backlog=40), last, replace(last, backlog=3)):
        observer.on_answers(sent)
    found = metrics(observer)
    assert found["imagestream_answers_total"] == 40
    assert found["imagestream_answers_backlog_messages"] == 3
    assert found["imagestream_last_answers_timestamp_seconds"] == last.at
    observer.on_batch(replace(Batch(), model_version=9))  # writes the state
    state = read_state(settings)
    assert state is not None
    assert state.answers == replace(last, backlog=3)
    _, out, _ = command_here("--home", settings.home, "status")
    assert "topic answers: batch 7 (40 answers), " in out
    assert "s ago, backlog 3" in out


@pytest.mark.parametrize(
    ("sent", "shown"),
    [
        (AnswersState("answers", 0), "none yet, backlog 0"),  # a new stream
        (AnswersState("answers", 7), "batch 7, backlog 0"),  # a restarted stream
        (AnswersState("answers", 7, backlog=1_040), "batch 7, backlog 1,040"),
    ],
)
def test_answers_of_an_earlier_start_are_shown_without_a_time(
    sent: AnswersState, shown: str, observer: Observer, settings: Settings
) -> None:
    observer.on_answers(sent)
    observer.on_start()  # writes the state
    _, out, _ = command_here("--home", settings.home, "status")
    assert f"topic answers: {shown}\n" in re.sub(" +\n", "\n", out)
    assert isnan(metrics(observer)["imagestream_last_answers_timestamp_seconds"])


def test_text_log_keeps_each_event_on_one_line() -> None:
    stream = io.StringIO()
    open_log("text", stream).warning("model refused", reason="two\nlines\x1b[31m", model_version=4)
    (line,) = stream.getvalue().splitlines()
    assert line.endswith('warning: model refused reason="two\\nlines\\u001b[31m" model_version=4')


def test_metrics_accumulate_over_batches(observer: Observer) -> None:
    observer.on_batch(Batch())
    failing = replace(Batch(), model_version=4, quarantined={}, predicted_rows=100, challenger_error="ValueError: x")
    observer.on_batch(failing)
    observer.on_refused(5, "its hash is wrong")
    observer.on_trouble("the broker is away")
    found = metrics(observer)
    assert found['imagestream_rows_total{outcome="predicted"}'] == 197
    assert found['imagestream_rows_total{outcome="quarantined"}'] == 3
    assert found['imagestream_quarantined_total{reason="empty"}'] == 2
    assert found["imagestream_input_bytes_total"] == 10_000
    assert found["imagestream_batches_total"] == 2
    assert [name for name in found if "imagestream_model_info" in name] == ['imagestream_model_info{version="4"}']
    assert found["imagestream_refused_models_total"] == 1
    assert found["imagestream_challenger_failures_total"] == 1
    assert found["imagestream_troubles_total"] == 1
    assert found['imagestream_stage_duration_seconds_sum{stage="backbone"}'] == 3.0
    assert found['imagestream_stage_duration_seconds_count{stage="decode"}'] == 2
    assert {re.sub(".*=", "", name) for name in found if "step_duration_seconds_sum" in name} == {
        '"plan"}',
        '"score"}',
        '"commit"}',
    }
    assert found["imagestream_batch_duration_seconds_sum"] == 4.0
    assert found["imagestream_publish_to_row_seconds_count"] == 6
    assert found['imagestream_publish_to_row_seconds_bucket{le="1.0"}'] == 2
    assert 0 <= time.time() - found["imagestream_last_batch_timestamp_seconds"] < 60
    assert found["process_start_time_seconds"] > 0
    assert found[f'imagestream_build_info{{version="{version("imagestream")}"}}'] == 1


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed: make test-tools")
def test_metrics_pass_the_prometheus_linter(observer: Observer) -> None:
    observer.on_batch(replace(Batch(), drift=Batch().drift | {"rows": 500.0}))
    observer.metrics.broker([PartitionLag("images", 0, committed=5, end=10, begin=0)])
    page = get(observer, "/metrics")[1]
    done = subprocess.run(["promtool", "check", "metrics"], input=page, capture_output=True, text=True, check=False)  # noqa: S607
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_observers_share_no_metrics(observer: Observer, settings: Settings) -> None:
    other = Observer(settings, NO_BROKER, metrics_port=0)
    other.on_batch(Batch())
    assert metrics(other)["imagestream_batches_total"] == 1
    assert metrics(observer)["imagestream_batches_total"] == 0
    other.close()


def test_health_is_200_only_while_the_query_is_active(settings: Settings) -> None:
    observer = Observer(settings, NO_BROKER, metrics_port=0, stale_after_s=0.5)
    assert get(observer, "/healthz") == (503, '{"healthy": false, "reason": "the stream is starting"}\n')
    assert [get(observer, path)[0] for path in ("/livez", "/readyz")] == [200, 503]
    observer.on_start()
    assert get(observer, "/healthz") == (200, '{"healthy": true, "reason": "streaming"}\n')
    wait_for(lambda: get(observer, "/healthz")[0] == 503)
    assert "no micro-batch and no idle poll" in get(observer, "/healthz")[1]
    observer.on_idle()
    assert get(observer, "/healthz")[0] == 200
    wait_for(lambda: get(observer, "/healthz")[0] == 503)
    observer.on_batch(Batch())
    assert get(observer, "/healthz")[0] == 200
    observer.on_failure("the disk is full")
    assert [get(observer, path)[0] for path in ("/livez", "/readyz")] == [503, 503]
    assert get(observer, "/healthz") == (
        503,
        '{"healthy": false, "reason": "the stream failed: the disk is full"}\n',
    )
    observer.close()


def test_stream_with_unavailable_broker_is_live_but_not_ready(observer: Observer) -> None:
    observer.on_start()
    wait_for(lambda: get(observer, "/readyz") == (503, '{"healthy": false, "reason": "the broker does not answer"}\n'))
    assert get(observer, "/livez")[0] == 200


def test_metrics_are_served_at_the_configured_address(settings: Settings) -> None:
    host = "0.0.0.0"  # noqa: S104  tested here
    observer = Observer(settings, NO_BROKER, metrics_port=0, host=host)
    served = {
        one.laddr.ip for one in psutil.Process().net_connections("tcp") if f":{one.laddr.port}" in str(observer.url)
    }
    assert host in served
    assert get(observer, "/livez")[0] == 200
    observer.close()


def test_unknown_path_is_404_and_unavailable_address_is_reported(observer: Observer, settings: Settings) -> None:
    assert get(observer, "/")[0] == 404
    with pytest.raises(ServiceError, match=r"cannot serve metrics at 192\.0\.2\.1:0 "):
        Observer(settings, NO_BROKER, metrics_port=0, host="192.0.2.1")
    port = int(str(observer.url).rsplit(":", 1)[1])
    with pytest.raises(ServiceError, match=f"cannot serve metrics at 127.0.0.1:{port}"):
        Observer(settings, NO_BROKER, metrics_port=port)


def test_lag_and_broker_status_need_no_batch(broker: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kafka import KafkaProducer

    monkeypatch.setattr(offsets, "TIMEOUT_MS", 300_000)
    settings = broker.model_copy(update={"home": tmp_path, "topic": new_topic()})
    producer = KafkaProducer(bootstrap_servers=broker.bootstrap_servers)
    for _ in range(25):
        producer.send(settings.topic, b"image", partition=0).get(timeout=300)
    commit_batch(settings, 0, {0: (0, 10)})
    observer = Observer(settings, str(broker.bootstrap_servers), metrics_port=0, probe_every_s=0.1)
    lag = f'imagestream_lag_messages{{partition="0",topic="{settings.topic}"}}'
    wait_for(lambda: metrics(observer).get(lag) == 15)
    assert metrics(observer)["imagestream_broker_up"] == 1
    commit_batch(settings, 1, {0: (10, 24)})
    observer.on_batch(Batch())
    wait_for(lambda: metrics(observer).get(lag) == 1)
    observer.close()
    producer.close()


def test_unavailable_broker_is_reported_without_lag(observer: Observer) -> None:
    wait_for(lambda: metrics(observer)["imagestream_broker_up"] == 0)
    found = metrics(observer)
    assert not any("lag" in name for name in found)


def test_state_file_describes_the_process_and_outlives_it(settings: Settings) -> None:
    observer = Observer(settings, NO_BROKER, metrics_port=0)
    assert read_state(settings) is None  # until the query starts, another process may stream this topic
    observer.on_start()
    observer.on_batch(Batch())
    state = read_state(settings)
    assert state is not None
    assert (state.pid, state.phase, state.model_version, state.url) == (os.getpid(), "running", 3, observer.url)
    assert state.alive
    assert state.health() == (True, "streaming")
    observer.close()
    ended = read_state(settings)
    assert ended is not None
    assert ended.health() == (False, "the stream has ended")


def test_ended_process_or_reused_pid_is_not_alive(settings: Settings) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = psutil.Process(child.pid).create_time()
    write_state(settings, StreamState(child.pid, started, Phase.RUNNING, time.time()))
    state = read_state(settings)
    assert state is not None
    assert state.alive
    assert not replace(state, started=started - 100).alive
    child.kill()
    assert child.wait() != 0
    assert state.health() == (False, f"process {child.pid} of the stream no longer exists")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 1}', '{"phase": "odd"}', "\xff"])
def test_damaged_state_file_is_ignored(settings: Settings, content: str) -> None:
    path = settings.work_dir / "streams" / "images" / "state.json"
    path.parent.mkdir(parents=True)
    path.write_text(content, encoding="latin-1")
    assert read_state(settings) is None


def test_stream_on_another_host_is_alive_until_its_state_is_stale(settings: Settings) -> None:
    state = StreamState(1, 0.0, Phase.RUNNING, time.time(), host="another")
    write_state(settings, state)
    assert read_state(settings) == state
    assert state.alive
    assert not replace(state, seen=time.time() - 400).alive
    assert not replace(state, host=StreamState(1, 0.0, Phase.RUNNING, 0.0).host).alive


def test_unwritable_log_does_not_stop_the_stream(settings: Settings) -> None:
    full = open("/dev/full", "w", buffering=1, encoding="utf-8")  # noqa: PTH123, SIM115  closing it fails, too
    observer = Observer(settings, NO_BROKER, log=open_log("json", full))
    observer.on_start()
    observer.on_batch(Batch())
    observer.close()
    state = read_state(settings)
    assert state is not None
    assert state.model_version == 3
    with suppress(OSError):
        full.close()
