"""The Kafka source of the stream: its options, and the offsets of a micro-batch.

Spark records its plan in a checkpoint. Here the checkpoint is a temporary folder of one query, which starts from
offsets that come from the tables.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from pyspark.sql import DataFrame, SparkSession

from streaming.errors import DamagedError
from streaming.pipeline.decisions import OffsetRange
from streaming.platform.topic import Subscription

NO_NAMES: Mapping[str, str] = MappingProxyType({})
# A task requests only messages that exist, so waiting at the broker for more gains nothing. A broker answers a
# connection's requests in order: after each poll, the consumer sends a fetch ahead, and Spark's request for the offsets
# behind it waits until the broker gives up waiting for further messages (Kafka's default: 500 ms).
FETCH_WAIT_MS = 1
INPUT_COLUMNS = ["key", "value", "topic", "partition", "offset", "timestamp", "headers"]


def read_topics(
    spark: SparkSession,
    bootstrap_servers: str,
    subscription: Subscription,
    *,
    images_per_batch: int,
    starting_offsets: str,
    isolation: str,
    client: Mapping[str, str],
) -> DataFrame:
    """The topics as a streaming DataFrame of `INPUT_COLUMNS`.

    Args:
        images_per_batch: the maximum number of messages in a micro-batch.
        starting_offsets: where to begin, as Spark's JSON.
        isolation: `read_committed` or `read_uncommitted`.
        client: security options from `kafka_security.spark_options`.
    """
    return (
        spark.readStream.format("kafka")
        .options(**client)
        .option("kafka.bootstrap.servers", bootstrap_servers)
        .option("kafka.isolation.level", isolation)
        .option(*subscription.spark_option)
        .option("startingOffsets", starting_offsets)
        .option("includeHeaders", "true")
        .option("maxOffsetsPerTrigger", images_per_batch)
        .option("kafka.fetch.max.wait.ms", FETCH_WAIT_MS)
        .option("failOnDataLoss", "true")  # accepted losses are skipped by the starting offsets
        .load()
        .select(*INPUT_COLUMNS)
    )


def planned_ranges(scratch: Path, batch: int, names: Mapping[str, str] = NO_NAMES) -> list[OffsetRange]:
    """The offset ranges that Spark planned for a micro-batch, from the checkpoint that it wrote beforehand.

    `offsets/N` holds the end of batch N. The batch starts at the end of batch N - 1, and batch 0 at the source's first
    offsets. A partition that was added since then starts at 0.

    Args:
        scratch: the checkpoint's folder.
        batch: Spark's number of the batch, 0 for the first of the query.
        names: topic in Kafka → topic in the tables, if they differ.

    Raises:
        ServiceError: the checkpoint cannot be read.
    """
    ends = _offsets_in(scratch / "offsets" / str(batch))
    starts = _offsets_in(scratch / "offsets" / str(batch - 1) if batch > 0 else _first(scratch))
    ranges = []
    for topic, partitions in sorted(ends.items()):
        for partition, end in sorted(partitions.items(), key=lambda item: int(item[0])):
            start = starts.get(topic, {}).get(partition, 0)
            if end > start:
                ranges.append(OffsetRange(names.get(topic, topic), int(partition), start, end))
    return ranges


def first_offsets(checkpoint: Path) -> Mapping[str, Mapping[int, int]]:
    """Topic → partition → the first offset that the query of a checkpoint read; empty if there is no checkpoint."""
    if not _first(checkpoint).exists():
        return {}
    found = _offsets_in(_first(checkpoint))
    return {topic: {int(one): offset for one, offset in offsets.items()} for topic, offsets in found.items()}


def _first(checkpoint: Path) -> Path:
    return checkpoint / "sources" / "0" / "0"


def _offsets_in(path: Path) -> Mapping[str, Mapping[str, int]]:
    """The last line of a file of Spark's offset log: `{topic: {partition: offset}}` after a version line."""
    try:
        content = json.loads(path.read_text(encoding="utf-8").splitlines()[-1])
    except (OSError, ValueError, IndexError) as error:
        raise DamagedError(f"the checkpoint's offsets in {path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise DamagedError(f"the checkpoint's offsets in {path} should be a JSON object, got {content!r}")
    return content
