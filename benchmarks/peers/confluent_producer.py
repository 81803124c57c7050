"""confluent-kafka's producer (librdkafka), sending files that were read into memory before timing starts."""

import argparse
import json
import time
from pathlib import Path

from confluent_kafka import Producer


def main() -> None:
    """Send every file of a folder and write the acknowledged megabytes per second."""
    parser = argparse.ArgumentParser()
    for name in ("bootstrap", "topic"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("folder", "json"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    options = parser.parse_args()
    images = [path.read_bytes() for path in sorted(options.folder.iterdir())]
    producer = Producer(
        {
            "bootstrap.servers": options.bootstrap,
            "acks": "all",
            "linger.ms": 10,
            "batch.size": 1_000_000,
            "queue.buffering.max.kbytes": 1_048_576,
        }
    )
    producer.list_topics(timeout=10)
    clock = time.perf_counter()
    for number, image in enumerate(images):
        producer.produce(options.topic, image, f"{number:064x}")
        producer.poll(0)
    if left := producer.flush(60):
        raise SystemExit(f"{left} messages were not acknowledged")
    seconds = time.perf_counter() - clock
    options.json.write_text(json.dumps({"megabytes_per_s": sum(map(len, images)) / 1e6 / seconds}))


if __name__ == "__main__":
    main()
