"""Reads micro-batches that Spark cannot read, in bounded memory, after a number of failed attempts.

Spark's reader decompresses whole record batches. One that expands to more than the JVM's memory kills the process, at
the same offset at every start; a timestamp that Spark cannot represent fails the same micro-batch every time. So each
attempt is recorded in a file before it starts. A micro-batch that was started `TRIES` times but not finished is read by
a `BoundedReader` and scored in the driver: good messages get rows, and unreadable ones are quarantined by offset.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pyarrow as pa

from streaming.pipeline.decisions import OffsetRange, TopicPartition
from streaming.platform.bounded_reader import BoundedReader, Record
from streaming.storage.atomic_file import write_json

TRIES = 2
ROWS_AT_ONCE = 256
BYTES_AT_ONCE = 16 * 1024**2
HEADER = pa.struct([pa.field("key", pa.string()), pa.field("value", pa.binary())])
COLUMNS = pa.schema(
    [
        pa.field("key", pa.binary()),
        pa.field("value", pa.binary()),
        pa.field("topic", pa.string()),
        pa.field("partition", pa.int32()),
        pa.field("offset", pa.int64()),
        pa.field("timestamp_ms", pa.int64()),
        pa.field("headers", pa.list_(HEADER)),
    ]
)


class Attempts:
    """Counts the attempts at the current micro-batch, including those of processes that have died.

    Args:
        file: in a local folder. If it is lost, a batch is only tried more often.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._last: tuple[int, list[OffsetRange], int] | None = self._read()

    def begin(self, number: int, ranges: Sequence[OffsetRange]) -> None:
        """Record the start of a micro-batch."""
        tries = self._last[2] if self._last is not None and self._has_same_start(number, ranges) else 0
        self._last = number, list(ranges), tries + 1
        content = {"number": number, "tries": tries + 1, "ranges": [asdict(one) for one in ranges]}
        with suppress(OSError):  # a full disk
            write_json(self._file, content)

    def exhausted(self, number: int, ends: Mapping[TopicPartition, int]) -> list[OffsetRange]:
        """The ranges of the next micro-batch if all of its attempts have failed; otherwise empty.

        Args:
            number: of the next batch.
            ends: where it must begin.
        """
        if self._last is None or self._last[0] != number or self._last[2] < TRIES:
            return []
        ranges = self._last[1]
        return ranges if all(ends.get((one.topic, one.partition)) == one.start for one in ranges) else []

    def _has_same_start(self, number: int, ranges: Sequence[OffsetRange]) -> bool:
        """Whether a micro-batch begins where the last one did; it may be smaller."""
        if self._last is None:
            return False
        before = {(one.topic, one.partition): one.start for one in self._last[1]}
        return self._last[0] == number and all(before.get((one.topic, one.partition)) == one.start for one in ranges)

    def _read(self) -> tuple[int, list[OffsetRange], int] | None:
        try:
            content = json.loads(self._file.read_text())
            ranges = [OffsetRange(**one) for one in content["ranges"]]
            return int(content["number"]), ranges, int(content["tries"])
        except (OSError, ValueError, TypeError, KeyError):  # it does not exist, or is damaged
            return None


@dataclass(frozen=True)
class BoundedMessages:
    """The messages of a micro-batch.

    Attributes:
        batches: of the schema `COLUMNS`, topics by their names in Kafka; can be read once.
        refused: (topic, partition, offset) → reason, of messages that could not be read; grows while `batches` is read.
    """

    batches: Iterator[pa.RecordBatch]
    refused: dict[tuple[str, int, int], str] = field(default_factory=dict)


def read_bounded(
    reader: BoundedReader, ranges: Sequence[OffsetRange], kafka_names: Mapping[str, str]
) -> BoundedMessages:
    """The messages of offset ranges.

    Args:
        ranges: topics by their names in the tables.
        kafka_names: topic in the tables → topic in Kafka.
    """
    refused: dict[tuple[str, int, int], str] = {}

    def batches() -> Iterator[pa.RecordBatch]:
        for one in ranges:
            topic = kafka_names[one.topic]
            waiting: list[Record] = []
            size = 0
            for record in reader.read(topic, one.partition, one.start, one.end):
                if record.refused is not None:
                    refused[topic, one.partition, record.offset] = record.refused
                waiting.append(record)
                size += len(record.value or b"") + len(record.key or b"")
                if len(waiting) >= ROWS_AT_ONCE or size >= BYTES_AT_ONCE:
                    yield _as_batch(topic, one.partition, waiting)
                    waiting, size = [], 0
            if waiting:
                yield _as_batch(topic, one.partition, waiting)

    return BoundedMessages(batches(), refused)


def _as_batch(topic: str, partition: int, records: Sequence[Record]) -> pa.RecordBatch:
    columns = {
        "key": [one.key for one in records],
        "value": [one.value for one in records],
        "topic": [topic] * len(records),
        "partition": [partition] * len(records),
        "offset": [one.offset for one in records],
        "timestamp_ms": [one.timestamp_ms for one in records],
        "headers": [[{"key": key, "value": value} for key, value in one.headers] for one in records],
    }
    return pa.RecordBatch.from_arrays([pa.array(columns[one.name], one.type) for one in COLUMNS], schema=COLUMNS)
