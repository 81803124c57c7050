"""What is the latency from publishing an image to its committed row, at 20 images per second?"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.pairs import Pair
from benchmarks.processes import end
from benchmarks.service import Service, a_service
from producer.message import build_message
from streaming.query import query
from streaming.settings import Settings

RATE, SECONDS, WARM_UP_S = 20, 90, 30
AIMS = {0.5: 0.40, 0.95: 0.65}  # quantile → seconds

SQL = """
SELECT quantile_cont(epoch(b.committed_at) - epoch(p.published_at), $quantile) AS seconds, count(*) AS rows
FROM predictions p JOIN batches b USING (query_id, batch_id)
WHERE p.topic = $topic AND epoch(p.published_at) >= $since
"""


def questions() -> Iterator[Pair]:
    with TemporaryDirectory() as scratch, a_service(Path(scratch)) as service:
        settings = service.home("plain")
        since = _stream_steadily(service, settings, "latency")
        for quantile, aim in AIMS.items():
            parameters = {"quantile": quantile, "topic": "latency", "since": since}
            (row,) = query(settings, SQL, parameters=parameters).to_pylist()
            question = f"publish → committed row at {RATE} images/s, {quantile:.0%} of {row['rows']:,}, against the aim"
            yield Pair(question, "s", 1.0, [row["seconds"]], [aim], less_is_better=True)


def _stream_steadily(service: Service, settings: Settings, topic: str) -> float:
    """Publish at a constant rate to a running stream; returns the time at which the measured part began."""
    command = [sys.executable, "-m", "streaming", "--home", str(settings.home), "stream"]

    with (service.scratch / "stream.log").open("w") as log:
        stream = subprocess.Popen(
            command, env=os.environ | service.environment(topic), stdout=log, stderr=log, start_new_session=True
        )
    try:
        start = time.time()
        publish_steadily(service, topic, RATE, WARM_UP_S + SECONDS)
        time.sleep(5)
    finally:
        end(stream)
    return start + WARM_UP_S


def publish_steadily(service: Service, topic: str, per_second: int, seconds: int) -> None:
    """Publish images at a constant rate."""
    from kafka import KafkaProducer

    producer = KafkaProducer(bootstrap_servers=service.settings.bootstrap_servers, linger_ms=0)
    try:
        start = time.time()
        for number in range(per_second * seconds):
            time.sleep(max(0.0, start + number / per_second - time.time()))
            message = build_message(service.images[number % len(service.images)], f"{number}.jpg")
            producer.send(topic, message.value, f"{number:064x}".encode(), message.headers)
        producer.flush()
    finally:
        producer.close()
