"""What is the latency from publishing an image to its committed row, at 20 images per second?"""

import time
from collections.abc import Iterator

from benchmarks.pairs import Pair
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
    with a_service() as service:
        settings = service.home("plain")
        since = _stream_steadily(service, settings, "latency")
        for quantile, aim in AIMS.items():
            parameters = {"quantile": quantile, "topic": "latency", "since": since}
            (row,) = query(settings, SQL, parameters=parameters).to_pylist()
            question = f"publish → committed row at {RATE} images/s, {quantile:.0%} of {row['rows']:,}, against the aim"
            yield Pair(question, "s", 1.0, [row["seconds"]], [aim], less_is_better=True)


def _stream_steadily(service: Service, settings: Settings, topic: str) -> float:
    """Publish at a constant rate to a running stream; returns the time at which the measured part began."""
    with service.streaming(settings, topic):
        start = time.time()
        publish_steadily(service, topic, RATE, WARM_UP_S + SECONDS)
        time.sleep(5)
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
