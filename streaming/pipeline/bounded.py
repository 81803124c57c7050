"""Micro-batches that Spark cannot read: what was tried, and reading them in bounded memory.

Spark's reader unpacks whole record batches. One that unpacks to more than its JVM has memory for ends the process, at
the same offset at every start; a timestamp that Spark cannot hold fails the same micro-batch again and again. So each
attempt is noted in a file before it begins. A micro-batch that was begun `TRIES` times and never finished is read by
`BoundedReader` and scored in the driver: its good messages have their rows, and what cannot be read is quarantined by
its offset.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pyarrow as pa

from streaming.pipeline.account import Place
from streaming.pipeline.decisions import OffsetRange
from streaming.platform.bounded_reader import BoundedReader, Record

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
    """How often the micro-batch at hand was begun, also by processes that have died.

    Args:
        file: in a local folder. What it holds is a hint: without it, a batch is only tried once more.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._last: tuple[int, list[OffsetRange], int] | None = self._read()

    def begin(self, number: int, ranges: Sequence[OffsetRange]) -> None:
        """Note that a micro-batch is begun."""
        tries = self._last[2] if self._last is not None and self._begins_alike(number, ranges) else 0
        self._last = number, list(ranges), tries + 1
        content = {"number": number, "tries": tries + 1, "ranges": [asdict(one) for one in ranges]}
        unfinished = self._file.with_suffix(".new")
        with suppress(OSError):  # a full disk
            self._file.parent.mkdir(parents=True, exist_ok=True)
            unfinished.write_text(json.dumps(content))
            os.replace(unfinished, self._file)  # noqa: PTH105

    def hopeless(self, number: int, ends: Mapping[Place, int]) -> list[OffsetRange]:
        """The ranges of a micro-batch that was begun too often to be begun in the same way again; empty for another.

        Args:
            number: of the next batch.
            ends: where it must begin.
        """
        if self._last is None or self._last[0] != number or self._last[2] < TRIES:
            return []
        ranges = self._last[1]
        return ranges if all(ends.get((one.topic, one.partition)) == one.start for one in ranges) else []

    def _begins_alike(self, number: int, ranges: Sequence[OffsetRange]) -> bool:
        """Whether it begins where the last one did; it may be smaller."""
        if self._last is None:
            return False
        before = {(one.topic, one.partition): one.start for one in self._last[1]}
        return self._last[0] == number and all(before.get((one.topic, one.partition)) == one.start for one in ranges)

    def _read(self) -> tuple[int, list[OffsetRange], int] | None:
        try:
            content = json.loads(self._file.read_text())
            ranges = [OffsetRange(**one) for one in content["ranges"]]
            return int(content["number"]), ranges, int(content["tries"])
        except (OSError, ValueError, TypeError, KeyError):  # there is none, or it is damaged
            return None


@dataclass(frozen=True)
class BoundedMessages:
    """The messages of a micro-batch.

    Attributes:
        batches: of `COLUMNS`, topics by their names in Kafka; read once.
        refused: (topic, partition, offset) → why it could not be read, of the batches given so far.
    """

    batches: Iterator[pa.RecordBatch]
    refused: dict[tuple[str, int, int], str] = field(default_factory=dict)


def read_bounded(
    reader: BoundedReader, ranges: Sequence[OffsetRange], kafka_names: Mapping[str, str]
) -> BoundedMessages:
    """The messages of ranges of offsets.

    Args:
        kafka_names: topic in the tables → in Kafka.
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
