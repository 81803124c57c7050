"""How long does an answer take from publishing to the answers topic, and what do answers cost in throughput?"""

import json
import time
from collections.abc import Iterator
from statistics import quantiles
from threading import Event, Thread

from benchmarks.latency import publish_steadily
from benchmarks.pairs import Pair
from benchmarks.service import Service, a_service
from streaming.settings import Settings

RATE, SECONDS, WARM_UP_S = 20, 90, 30
AIMS = {50: 0.30, 95: 0.55}  # percentile → seconds
IMAGES, IMAGES_PER_BATCH, RUNS = 3_000, 500, 3
AIM = 0.95  # of the throughput without answers


def questions() -> Iterator[Pair]:
    with a_service() as service:
        settings = service.home("plain")
        waits = _answered(service, settings)
        percentiles = quantiles(waits, n=100)
        for percentile, aim in AIMS.items():
            question = f"publish → answer at {RATE} images/s, {percentile} % of {len(waits):,}, against the aim"
            yield Pair(question, "s", 1.0, [percentiles[percentile - 1]], [aim], less_is_better=True)
        rates: dict[bool, list[float]] = {True: [], False: []}
        for run in range(RUNS):
            for answers, found in rates.items():
                topic = f"images-{run}-{answers}"
                options = ("--answers-topic", f"answers-{run}") if answers else ()
                found.append(service.images_per_s(settings, topic, IMAGES, IMAGES_PER_BATCH, *options))
        yield Pair("catching up with answers, against without", "images/s", AIM, rates[True], rates[False])


def _answered(service: Service, settings: Settings) -> list[float]:
    """Seconds from the append of each image until a consumer with `read_committed` receives its answer."""
    waits: list[float] = []
    over, ready = Event(), Event()
    reader = Thread(target=_read, args=(str(service.settings.bootstrap_servers), ready, over, waits))
    with service.streaming(settings, "asked", "--answers-topic", "answers"):
        try:
            reader.start()
            ready.wait()
            publish_steadily(service, "asked", RATE, WARM_UP_S)
            waits.clear()
            publish_steadily(service, "asked", RATE, SECONDS)
            time.sleep(5)
        finally:
            over.set()
            reader.join()
    return waits


def _read(servers: str, ready: Event, over: Event, waits: list[float]) -> None:
    from kafka import KafkaConsumer, TopicPartition

    consumer = KafkaConsumer(bootstrap_servers=servers, isolation_level="read_committed", fetch_max_wait_ms=50)
    while not (partitions := consumer.partitions_for_topic("answers")) and not over.wait(0.5):
        pass
    consumer.assign([TopicPartition("answers", one) for one in partitions or ()])
    consumer.seek_to_beginning()
    ready.set()
    while not over.is_set():
        for messages in consumer.poll(timeout_ms=200).values():
            now = time.time()
            waits.extend(now - json.loads(message.value)["timestamp_ms"] / 1000 for message in messages)
    consumer.close()
