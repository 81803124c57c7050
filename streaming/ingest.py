"""The Kafka side of the stream: the source, its options, and the offsets of a micro-batch."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pyspark.sql import DataFrame, SparkSession

from streaming.errors import ServiceError
from streaming.score import INPUT_COLUMNS

BROKER_TIMEOUT_MS = 10_000


@dataclass(frozen=True)
class OffsetRange:
    """The messages of one topic partition in one micro-batch: from `start` to just before `end`."""

    topic: str
    partition: int
    start: int
    end: int

    @property
    def rows(self) -> int:
        return self.end - self.start


def ensure_topic(bootstrap_servers: str, topic: str) -> None:
    """Make the topic with the broker's defaults if it is not there.

    Raises:
        ServiceError: the broker does not answer, or does not let us.
    """
    from kafka.admin import KafkaAdminClient, NewTopic
    from kafka.errors import KafkaError, TopicAlreadyExistsError

    try:
        admin = KafkaAdminClient(
            bootstrap_servers=bootstrap_servers,
            request_timeout_ms=BROKER_TIMEOUT_MS,
            bootstrap_timeout_ms=BROKER_TIMEOUT_MS,
        )
    except (KafkaError, ValueError) as error:
        raise ServiceError(
            f"no Kafka broker answers at {bootstrap_servers} ({error}); "
            "start the home's own with 'imagestream broker start', or check --bootstrap-servers"
        ) from error
    try:
        if topic not in admin.list_topics():
            admin.create_topics([NewTopic(topic, num_partitions=-1, replication_factor=-1)])
    except TopicAlreadyExistsError:
        pass  # another process was quicker
    except KafkaError as error:
        raise ServiceError(f"topic {topic!r} is not there and cannot be made: {error}") from error
    finally:
        admin.close()


def read_topic(spark: SparkSession, bootstrap_servers: str, topic: str, max_images_per_batch: int) -> DataFrame:
    """The topic as an unbounded DataFrame of the columns that scoring reads, from its first message on."""
    return (
        spark.readStream.format("kafka")
        .option("kafka.bootstrap.servers", bootstrap_servers)
        .option("subscribe", topic)
        .option("startingOffsets", "earliest")
        .option("includeHeaders", "true")
        .option("maxOffsetsPerTrigger", max_images_per_batch)
        .option("failOnDataLoss", "true")
        .load()
        .select(*INPUT_COLUMNS)
    )


def batch_offsets(checkpoint: Path, batch_id: int) -> list[OffsetRange]:
    """What Spark planned for a micro-batch, read from the checkpoint that it wrote before running it.

    `offsets/N` holds where batch N ends. It starts where N - 1 ends, and batch 0 where the source first looked. A
    partition that appeared since then starts at 0.
    """
    ends = _offsets_in(checkpoint / "offsets" / str(batch_id))
    if batch_id > 0:
        starts = _offsets_in(checkpoint / "offsets" / str(batch_id - 1))
    else:
        starts = _offsets_in(checkpoint / "sources" / "0" / "0")
    ranges = []
    for topic, partitions in sorted(ends.items()):
        for partition, end in sorted(partitions.items(), key=lambda item: int(item[0])):
            start = starts.get(topic, {}).get(partition, 0)
            if end > start:
                ranges.append(OffsetRange(topic, int(partition), start, end))
    return ranges


def _offsets_in(path: Path) -> Mapping[str, Mapping[str, int]]:
    """The last line of a file of Spark's offset log: `{topic: {partition: offset}}` after a version line."""
    try:
        content = json.loads(path.read_text(encoding="utf-8").splitlines()[-1])
    except (OSError, ValueError, IndexError) as error:
        raise ServiceError(f"the checkpoint's offsets in {path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ServiceError(f"the checkpoint's offsets in {path} should be a JSON object, got {content!r}")
    return content
