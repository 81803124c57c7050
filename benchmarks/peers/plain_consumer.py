"""A consumer without a framework: confluent-kafka, LiteRT, deltalake; at least once, one process per core."""

import argparse
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
from confluent_kafka import Consumer
from deltalake import write_deltalake
from scoring import Commits, Scoring, write_speed

ROWS_PER_COMMIT = 1_000
IDLE_S = 5.0  # without a message, after which the topic counts as drained


def consume(options: argparse.Namespace, group: str, results: Any) -> None:
    """Consume until the topic is drained: decode, score, append to the table, then commit the offsets."""
    scoring = Scoring("litert", options.model, options.head)
    consumer = Consumer(
        {
            "bootstrap.servers": options.bootstrap,
            "group.id": group,
            "auto.offset.reset": "earliest",
            "enable.auto.commit": False,
            "fetch.min.bytes": 1_000_000,
            "queued.max.messages.kbytes": 131_072,
        }
    )
    consumer.subscribe([options.topic])
    commits, columns, idle_since = Commits(), [], time.time()
    waiting = 0

    def commit() -> None:
        nonlocal waiting
        if not waiting:
            return
        rows = pa.concat_tables([pa.table(one) for one in columns])
        write_deltalake(options.table, rows, mode="append")
        consumer.commit(asynchronous=False)
        commits.add(rows.num_rows)
        columns.clear()
        waiting = 0

    while time.time() - idle_since < IDLE_S:
        messages = [one for one in consumer.consume(64, timeout=0.5) if one.error() is None]
        if not messages:
            commit()
            continue
        idle_since = time.time()
        columns.append(
            scoring.rows([one.value() for one in messages], [(one.partition(), one.offset()) for one in messages])
        )
        waiting += len(messages)
        if waiting >= ROWS_PER_COMMIT:
            commit()
            idle_since = time.time()
    commit()
    consumer.close()
    results.put(commits)


def main() -> None:
    """Drain the topic and write the committed images per second."""
    parser = argparse.ArgumentParser()
    for name in ("bootstrap", "topic", "table"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("model", "head", "json"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    results, group = context.Queue(), f"consumer-{os.getpid()}"
    processes = [context.Process(target=consume, args=(options, group, results)) for _ in range(os.cpu_count() or 1)]
    for process in processes:
        process.start()
    found = [results.get() for _ in processes]
    for process in processes:
        process.join()
    write_speed(found, options.json)


if __name__ == "__main__":
    main()
