"""`imagestream status` with a real broker, real tables and real processes."""

import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import psutil
import pytest
from kafka.admin import KafkaAdminClient

from streaming.images.dataset import digit_images
from streaming.pipeline.observe import Phase, StreamState, write_state
from streaming.pipeline.status import read_status
from streaming.registry import open_registry
from streaming.settings import Settings
from tests.conftest import command_here, environment, environment_of, imagestream
from tests.producer.topics import configure_topic, create_topic
from tests.streaming.history import commit_batch, new_topic


@pytest.fixture
def settings(broker: Settings, tmp_path: Path) -> Settings:
    """A topic of two partitions with 30 and 5 messages, of which 20 and 5 are committed, 3 of them quarantined."""
    from kafka import KafkaProducer

    settings = broker.model_copy(update={"home": tmp_path, "topic": new_topic()})
    create_topic(broker.bootstrap_servers, settings.topic, partitions=2)
    producer = KafkaProducer(bootstrap_servers=broker.bootstrap_servers)
    for partition, count in ((0, 30), (1, 5)):
        for _ in range(count):
            producer.send(settings.topic, b"image", partition=partition).get(timeout=300)
    producer.close()
    commit_batch(settings, 0, {0: (0, 10), 1: (0, 5)}, bad={7, 8})
    commit_batch(settings, 1, {0: (10, 20)}, bad={13}, version=2)
    return settings


def write_stream_state(settings: Settings, phase: Phase = Phase.RUNNING, seen: float | None = None) -> None:
    """Write a state file with this process as the stream."""
    started = psutil.Process().create_time()
    write_state(settings, StreamState(os.getpid(), started, phase, seen or time.time(), model_version=2))


def with_champion(settings: Settings, trained: Path) -> Settings:
    (settings.work_dir / "models").symlink_to(trained / "models")
    return settings


def test_lag_rate_batch_and_quarantine_are_reported(settings: Settings) -> None:
    found = read_status(settings)
    assert [(one.partition, one.committed, one.end, one.lag) for one in found.partitions] == [
        (0, 20, 30, 10),
        (1, 5, 5, 0),
    ]
    assert (found.broker_up, found.lag) == (True, 10)
    assert found.images_per_second == pytest.approx(25 / 4)  # two batches of two seconds
    assert found.last_batch is not None
    assert (found.last_batch.batch_id, found.last_batch.model_version, found.last_batch.input_rows) == (1, 2, 10)
    assert found.last_batch.age_s >= 0
    assert found.quarantined == {"not_an_image": 1, "truncated": 2}


def test_messages_near_retention_are_reported(settings: Settings) -> None:
    assert read_status(settings).near_retention == {}
    # More than half of this retention has passed; Kafka deletes expired messages only every five minutes.
    with closing(KafkaAdminClient(bootstrap_servers=settings.bootstrap_servers)) as admin:
        configure_topic(admin, settings.topic, retention_ms=2)
    assert read_status(settings).near_retention == {settings.topic: 10}
    image = settings.work_dir / "digit.png"
    image.write_bytes(next(iter(digit_images(1)))[2])
    with environment(**environment_of(settings)):
        code, _, error = command_here("--home", settings.home, "publish", image)
    assert (code, f"{settings.topic}: 10 unprocessed messages" in error) == (0, True), error


def test_health_requires_broker_stream_and_champion(settings: Settings, trained: Path) -> None:
    write_stream_state(with_champion(settings, trained))
    found = imagestream(settings, "status")
    assert (found["healthy"], found["reasons"], found["streaming"]) == (True, [], True)
    assert found["aliases"]["champion"] == open_registry(settings.home).target("champion")
    assert found["lag"] == 10  # a lag does not make a running stream unhealthy

    write_stream_state(settings, Phase.ENDED)
    assert imagestream(settings, "status", code=1)["reasons"] == ["the stream has ended"]


def test_silent_stream_is_not_healthy(settings: Settings) -> None:
    write_stream_state(settings, seen=time.time() - 400)
    found = read_status(settings)
    assert found.streaming
    assert "no micro-batch and no idle poll for 400 s" in found.reasons[0]


def test_unavailable_broker_is_reported_with_the_remaining_status(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streaming.pipeline.offsets.TIMEOUT_MS", 100)
    write_stream_state(settings)
    found = read_status(settings.model_copy(update={"bootstrap_servers": "127.0.0.1:1"}))
    assert found.reasons[0] == "the broker at 127.0.0.1:1 does not answer"
    assert (found.broker_up, found.lag, found.streaming) == (False, None, True)
    assert [(one.committed, one.end, one.lag) for one in found.partitions] == [(20, None, None), (5, None, None)]


def test_status_of_an_unused_home(tmp_path: Path) -> None:
    found = imagestream(Settings(home=tmp_path, bootstrap_servers=None), "status", code=1)
    assert found["healthy"] is False
    assert found["reasons"] == [
        "the home's broker is not running",
        "no stream has run on this topic here",
        f"there is no champion model in {tmp_path / 'models'}",
    ]
    assert found["partitions"] == []


def test_watch_continues_until_interrupted(settings: Settings) -> None:
    command = [sys.executable, "-m", "streaming", "--home", str(settings.home), "status", "--watch"]
    command += ["--topic", settings.topic, "--bootstrap-servers", str(settings.bootstrap_servers)]
    watch = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert watch.stdout is not None
    tables = 0
    while tables < 2:
        line = watch.stdout.readline()
        assert line, "the command ended"
        tables += "lag 10" in line
    watch.send_signal(signal.SIGINT)
    watch.communicate(timeout=300)
    assert watch.returncode == 1  # not healthy
