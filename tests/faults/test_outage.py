"""The broker fails during publishing and streaming and recovers: no acknowledged message is lost."""

import hashlib
import os
import signal
import threading
import time
from pathlib import Path
from random import Random

import producer
from streaming.jobs.audit import audit
from streaming.platform.broker import running_broker, start_broker, stop_broker
from streaming.platform.topic import describe_topic
from streaming.settings import Settings
from tests.faults.harness import Drained, rows, scored, stream_during
from tests.faults.poison import encode, picture
from tests.forms import Form, Record

FILES_PER_S = 10
MAX_TRIES = 20  # of publishing a folder: the publisher gives up after 30 s without a response


class Publishing(threading.Thread):
    """Publishes a folder slowly, and again until all of it is acknowledged."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        super().__init__()
        self._settings = settings
        self._folder = folder
        self.acknowledged = False
        self.tries = 0

    def run(self) -> None:
        while not self.acknowledged and self.tries < MAX_TRIES:
            self.tries += 1
            summary = producer.publish(
                [self._folder],
                bootstrap_servers=str(self._settings.bootstrap_servers),
                topic=self._settings.topic,
                on_progress=lambda _: time.sleep(1 / FILES_PER_S),
                connect_timeout_s=60,
            )
            self.acknowledged = summary.complete


def _kill_broker(broker: Settings) -> None:
    state = running_broker(broker)
    assert state is not None
    os.kill(state.pid, signal.SIGKILL)
    assert stop_broker(broker) or running_broker(broker) is None  # waits until it has ended


def _write_pictures(folder: Path, count: int, rng: Random) -> set[str]:
    """Write distinct pictures; returns their SHA-256, which are the message ids."""
    folder.mkdir()
    ids = set()
    for number in range(count):
        data = encode(picture(rng), "PNG") + f"{folder.name} {number}".encode()
        (folder / f"{number:04}.png").write_bytes(data)
        ids.add(hashlib.sha256(data).hexdigest())
    return ids


def test_broker_outage_loses_no_acknowledged_message(
    fragile_service: Settings, fragile_broker: Settings, rng: Random, form: Form[int], tmp_path: Path, record: Record
) -> None:
    service, broker = fragile_service, fragile_broker
    outages, outage_s = form(10, 1), form(30, 5)
    published: set[str] = set()
    tries = total = 0

    def fail_and_recover(stream: Drained) -> None:
        nonlocal tries, total
        for number in range(outages):
            published.update(_write_pictures(folder := tmp_path / str(number), FILES_PER_S * (outage_s + 6), rng))
            publishing = Publishing(service, folder)
            publishing.start()
            before = stream.rows
            stream.wait_for(lambda before=before: stream.rows > before)  # publishing and streaming are running

            stop_broker(broker) if rng.random() < 0.5 else _kill_broker(broker)
            time.sleep(outage_s)
            start_broker(broker)

            publishing.join()
            assert publishing.acknowledged
            tries += publishing.tries
        topic = describe_topic(str(service.bootstrap_servers), service.topic)
        total = sum(topic.ends.values()) - sum(topic.begins.values())
        stream.wait_for(lambda: scored(service) >= total)

    stream_during(service, fail_and_recover, images_per_batch=50)
    found = {row["image_id"] for row in rows(service, "SELECT image_id FROM predictions")}
    assert found == published
    report = audit(service)
    assert report.clean, [problem.text for problem in report.problems]
    assert report.predicted == total
    if tries == outages:  # the broker stores retries of the idempotent producer once
        assert total == len(published)
    record("outage: broker unavailable", form("10 × 30 s", "1 × 5 s"), f"{outages} × {outage_s} s")
    record("outage: acknowledged messages lost", "0", f"0 of {len(published):,}")
