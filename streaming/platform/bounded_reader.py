"""Reads messages one by one in bounded memory, regardless of their decompressed size.

A record batch of a few kilobytes can expand to gigabytes, in one value or in millions of headers, and Kafka clients
decompress all of it first. Here a batch is decompressed as a stream: a record that exceeds the limits is skipped, so
that only its offset is known; if a batch exceeds its limit, the rest is skipped, and its remaining records are only
counted. Aborted messages and transaction markers are left out if committed messages are requested.

Source: "Record Batch" in the documentation of Kafka's message format (kafka.apache.org/documentation/#messageformat);
aborted transactions as in `FetchCollector` of its client.
"""

import struct
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from time import monotonic, sleep
from typing import Any

import crc32c
import pyarrow as pa

from producer.message import HEADER_MARGIN_BYTES, MAX_MESSAGE_BYTES
from streaming.errors import DataError, ServiceError
from streaming.platform.kafka_client import connect
from streaming.platform.topic import OPEN, TIMEOUT_MS

MAX_RECORD_BYTES = MAX_MESSAGE_BYTES + 16 * HEADER_MARGIN_BYTES
MAX_HEADERS = 1_000
MAX_UNPACKED_BYTES = 1024**3  # per batch, to limit the time for decompression
MAX_BLOCK_BYTES = 64 * 1024**2  # of a snappy block, which is decompressed at once
FETCH_BYTES = 1024**2  # the first batch is complete, however large
STALL_TIMEOUT_S = 60.0  # without progress
RETRY_S = 0.1

BATCH_HEADER = struct.Struct(">qiibIhiqqqhii")
BODY_AT = 21  # where the part of a batch begins that its checksum covers
MAGIC = 2
CODECS = {1: "gzip", 2: "snappy", 3: "lz4", 4: "zstd"}
LOG_APPEND_TIME, TRANSACTIONAL, CONTROL = 0x08, 0x10, 0x20  # of a batch's attributes
CONTROL_KEY = struct.Struct(">hh")  # of a control record: version and type
ABORT = 0
VARINT_BYTES = 10  # the maximum for 64 bits
MORE = 0x80
XERIAL = b"\x82SNAPPY\x00"  # the snappy framing of Java clients
CHUNK_BYTES = 64 * 1024

Headers = list[tuple[str, bytes | None]]


@dataclass(frozen=True)
class Record:
    """A message.

    Attributes:
        refused: why only the offset is known; None for a message that was read.
    """

    offset: int
    timestamp_ms: int
    key: bytes | None = None
    value: bytes | None = None
    headers: Headers = field(default_factory=list)
    refused: str | None = None


class BoundedReader:
    """Reads ranges of offsets over one connection that is kept open.

    Args:
        client: security arguments from `kafka_security.client_arguments`.
        committed: whether to leave out messages of aborted transactions, and to wait for open ones.

    Raises:
        kafka.errors.KafkaError, ServiceError: the broker does not answer, or denies access.
    """

    def __init__(self, bootstrap_servers: str, client: Mapping[str, Any] = OPEN, *, committed: bool) -> None:
        from kafka.admin import KafkaAdminClient

        timeouts = {"request_timeout_ms": 3 * TIMEOUT_MS, "bootstrap_timeout_ms": TIMEOUT_MS}
        self._admin = connect(KafkaAdminClient, bootstrap_servers=bootstrap_servers, **timeouts, **client)
        self._committed = committed

    def close(self) -> None:
        self._admin.close()

    def log_start(self, topic: str, partition: int) -> int:
        """The start of the partition's log; raises the errors of `read`."""
        from kafka import TopicPartition
        from kafka.admin import OffsetSpec

        place = TopicPartition(topic, partition)
        return int(self._admin.list_partition_offsets({place: OffsetSpec.EARLIEST})[place].offset)

    def read(self, topic: str, partition: int, start: int, end: int) -> Iterator[Record]:
        """The messages from `start` (inclusive) to `end` (exclusive), in order of their offsets.

        Raises:
            kafka.errors.KafkaError: the broker does not answer, or no longer has the first offset.
            ServiceError: a batch is damaged, or there is no progress.
        """
        position, moved = start, monotonic()
        while position < end:
            records, aborted = self._fetch(topic, partition, position)
            before = position
            for batch in _batches(records):
                position = max(position, batch.last_offset + 1)
                if self._committed and aborted.leaves_out(batch):
                    continue
                if not batch.control:
                    yield from (one for one in batch.records() if max(start, before) <= one.offset < end)
                if position >= end:
                    return
            if position > before:
                moved = monotonic()
            elif monotonic() - moved > STALL_TIMEOUT_S:
                raise ServiceError(
                    f"topic {topic!r} partition {partition}: expected messages up to offset {end - 1}, but received "
                    f"none after offset {position - 1} for {STALL_TIMEOUT_S:.0f} s"
                )

    def _fetch(self, topic: str, partition: int, offset: int) -> tuple[bytes, "_Aborted"]:
        from kafka import TopicPartition
        from kafka.errors import for_code
        from kafka.protocol.consumer import FetchRequest

        topics = FetchRequest.FetchTopic
        wanted = topics.FetchPartition(
            partition=partition, current_leader_epoch=-1, fetch_offset=offset, last_fetched_epoch=-1,
            log_start_offset=-1, partition_max_bytes=FETCH_BYTES,
        )  # fmt: skip
        request = FetchRequest(
            max_wait_ms=500, min_bytes=1, max_bytes=FETCH_BYTES, isolation_level=int(self._committed), session_id=0,
            session_epoch=-1, topics=[topics(topic=topic, partitions=[wanted])], forgotten_topics_data=[], rack_id="",
            min_version=4, max_version=11,
        )  # fmt: skip

        async def fetch() -> Any:
            (leader,) = await self._admin._async_get_leader_for_partitions({TopicPartition(topic, partition)})
            return await self._admin._manager.send(request, node_id=leader)

        give_up = monotonic() + TIMEOUT_MS / 1000
        while (answer := self._admin._manager.run(fetch).responses[0].partitions[0]).error_code:
            error = for_code(answer.error_code)(f"topic {topic!r} partition {partition}, offset {offset}")
            if not error.retriable or monotonic() > give_up:
                raise error
            sleep(RETRY_S)  # for example, another broker has become the leader
        aborted = [(one.first_offset, one.producer_id) for one in answer.aborted_transactions or ()]
        return bytes(answer.records or b""), _Aborted(aborted)


class _Aborted:
    """Finds the batches of a response that belong to aborted transactions."""

    def __init__(self, transactions: list[tuple[int, int]]) -> None:
        self._coming = sorted(transactions)
        self._producers: set[int] = set()

    def leaves_out(self, batch: "_Batch") -> bool:
        while self._coming and self._coming[0][0] <= batch.last_offset:
            self._producers.add(self._coming.pop(0)[1])
        if batch.control:
            if batch.is_abort_marker():
                self._producers.discard(batch.producer_id)
            return True
        return batch.transactional and batch.producer_id in self._producers


@dataclass(frozen=True)
class _Batch:
    """A record batch as received."""

    base_offset: int
    last_offset: int
    attributes: int
    base_timestamp: int
    max_timestamp: int
    producer_id: int
    count: int
    data: bytes  # the compressed records

    @property
    def transactional(self) -> bool:
        return bool(self.attributes & TRANSACTIONAL)

    @property
    def control(self) -> bool:
        return bool(self.attributes & CONTROL)

    def is_abort_marker(self) -> bool:
        key = next(self.records()).key or b""
        return len(key) >= CONTROL_KEY.size and CONTROL_KEY.unpack_from(key)[1] == ABORT

    def records(self) -> Iterator[Record]:
        codec = self.attributes & 0x07
        if codec and codec not in CODECS:
            raise DataError(f"offset {self.base_offset}: compression {codec} is not one of {sorted(CODECS)}")
        unpacked = _Unpacked(self.data, CODECS.get(codec))
        offset = self.base_offset - 1
        for number in range(self.count):
            try:
                record = self._record(unpacked)
            except _ExpansionError:
                # The offsets of the remaining records are not known, but at least consecutive from here.
                for left in range(self.count - number):
                    refused = f"its batch unpacks to more than {MAX_UNPACKED_BYTES:,} bytes"
                    yield Record(min(offset + 1 + left, self.last_offset), self.max_timestamp, refused=refused)
                return
            except (EOFError, ValueError, struct.error, OSError) as error:
                raise DataError(f"the batch at offset {self.base_offset} is damaged: {error}") from error
            offset = record.offset
            yield record

    def _record(self, unpacked: "_Unpacked") -> Record:
        length = unpacked.varint()
        if length < 0:
            raise ValueError(f"a record of {length} bytes")
        begin = unpacked.position
        unpacked.read(1)  # attributes, which are unused
        timestamp, offset = self.base_timestamp + unpacked.varint(), self.base_offset + unpacked.varint()
        if self.attributes & LOG_APPEND_TIME:
            timestamp = self.max_timestamp
        left = length - (unpacked.position - begin)
        if length > MAX_RECORD_BYTES:
            unpacked.skip(left)
            refused = f"expected a message of at most {MAX_RECORD_BYTES:,} bytes, got {length:,}"
            return Record(offset, timestamp, refused=refused)
        body = _Unpacked(unpacked.read(left), None)
        key, value, count = body.blob(), body.blob(), body.varint()
        if count > MAX_HEADERS:
            refused = f"expected at most {MAX_HEADERS:,} headers, got {count:,}"
            return Record(offset, timestamp, refused=refused)
        headers = [((body.blob() or b"").decode("utf-8", "replace"), body.blob()) for _ in range(count)]
        return Record(offset, timestamp, key, value, headers)


class _ExpansionError(Exception):
    """A batch expands to more than the limit."""


class _Unpacked:
    """The bytes of a batch's records, decompressed while they are read."""

    def __init__(self, data: bytes, codec: str | None) -> None:
        self.position = 0
        self._buffer = memoryview(b"")
        self._chunks = _chunks(data, codec)

    def read(self, count: int) -> bytes:
        parts = [bytes(part) for part in self._parts(count)]
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def skip(self, count: int) -> None:
        for _ in self._parts(count):
            pass

    def _parts(self, count: int) -> Iterator[memoryview]:
        if count < 0:
            raise ValueError(f"a length of {count}")
        if self.position + count > MAX_UNPACKED_BYTES:
            raise _ExpansionError
        self.position += count
        while count:
            if not self._buffer:
                self._buffer = memoryview(next(self._chunks, b""))
                if not self._buffer:
                    raise EOFError("it ends too soon")
            part, self._buffer = self._buffer[:count], self._buffer[count:]
            count -= len(part)
            yield part

    def varint(self) -> int:
        """A signed number of at most 64 bits: zigzag, seven bits per byte."""
        number = _unsigned(self.read(1)[0] for _ in range(VARINT_BYTES))
        return (number >> 1) ^ -(number & 1)

    def blob(self) -> bytes | None:
        length = self.varint()
        return None if length == -1 else self.read(length)


def _chunks(data: bytes, codec: str | None) -> Iterator[bytes]:
    if codec is None:
        yield data
    elif codec == "snappy":
        yield from _snappy_blocks(data)
    else:
        with closing(pa.CompressedInputStream(pa.BufferReader(data), codec)) as stream:
            while chunk := stream.read(CHUNK_BYTES):
                yield chunk


def _snappy_blocks(data: bytes) -> Iterator[bytes]:
    """The blocks of snappy data: Java clients write several, other clients one."""
    codec = pa.Codec("snappy")
    blocks = [data]
    if data.startswith(XERIAL):
        blocks, at = [], 16  # its name and two versions
        while at + 4 <= len(data):
            size = struct.unpack_from(">i", data, at)[0]
            blocks.append(data[at + 4 : at + 4 + size])
            at += 4 + max(0, size)
    for block in blocks:
        size = _unsigned(iter(block))  # a block begins with its decompressed size
        if size > MAX_BLOCK_BYTES:
            raise _ExpansionError
        yield codec.decompress(block, size, asbytes=True)


def _unsigned(data: Iterator[int]) -> int:
    """A little-endian number of seven bits per byte; the highest bit of a byte is set if another byte follows."""
    number = 0
    for place, byte in enumerate(islice(data, VARINT_BYTES)):
        number |= (byte & 0x7F) << 7 * place
        if not byte & MORE:
            return number
    raise ValueError("a number of more than 64 bits")


def _batches(data: bytes) -> Iterator[_Batch]:
    """The complete batches of a response, whose last one may be truncated.

    Raises:
        ServiceError: a batch does not match its checksum, or has an older format.
    """
    at = 0
    while at + BATCH_HEADER.size <= len(data):
        (base, length, _, magic, crc, attributes, last_delta, first_ms, max_ms, producer, _, _, count) = (
            BATCH_HEADER.unpack_from(data, at)
        )
        end = at + 12 + length
        if end > len(data):
            return
        if magic != MAGIC:
            raise DataError(f"the batch at offset {base} is of message format {magic}, expected {MAGIC}")
        if crc32c.crc32c(data[at + BODY_AT : end]) != crc:
            raise DataError(f"the batch at offset {base} does not match its checksum")
        packed = data[at + BATCH_HEADER.size : end]
        yield _Batch(base, base + last_delta, attributes, first_ms, max_ms, producer, count, packed)
        at = end
