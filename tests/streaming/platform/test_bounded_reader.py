"""Reading the records of a real broker within limits: compression codecs, transactions, and decompression bombs.

Batches of Kafka's Java producer, including lz4, are read in `tests/foreign`.
"""

import gzip
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pyarrow as pa
import pytest
from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from kafka.errors import NotLeaderForPartitionError, OffsetOutOfRangeError

from streaming.errors import ServiceError
from streaming.platform import bounded_reader
from streaming.platform.bounded_reader import MAX_HEADERS, BoundedReader
from streaming.settings import Settings
from tests.faults.record_batches import batch_of, gzip_bomb, produce, record
from tests.producer.topics import create_topic
from tests.streaming.history import new_topic

HEADERS = [("label", b"7"), ("label", None), ("bytes", b"\x00\xff"), ("empty", b"")]
RECORDS = [(None, b"first", []), (b"key", None, HEADERS), (b"", b"x" * 100_000, [])]


@pytest.fixture
def topic(broker: Settings) -> str:
    """A topic that stores batches as the producer compressed them."""
    topic = new_topic()
    create_topic(broker.bootstrap_servers, topic, compression_type="producer")
    return topic


@pytest.fixture
def reader(broker: Settings) -> Iterator[BoundedReader]:
    with closing(BoundedReader(str(broker.bootstrap_servers), committed=True)) as reader:
        yield reader


def framed_snappy(data: bytes) -> bytes:
    """The framing of Java clients: blocks of 32 KiB with their sizes."""
    codec = pa.Codec("snappy")
    blocks = [codec.compress(data[at : at + 32_768], asbytes=True) for at in range(0, len(data), 32_768)]
    return b"\x82SNAPPY\x00" + bytes([0, 0, 0, 1] * 2) + b"".join(len(one).to_bytes(4, "big") + one for one in blocks)


def stream_of(codec: str, data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, codec) as out:
        out.write(data)
    return bytes(sink.getvalue())


@pytest.mark.parametrize(
    ("codec", "compress"),
    [
        (0, bytes),
        (1, gzip.compress),
        (2, framed_snappy),
        (2, lambda data: pa.Codec("snappy").compress(data, asbytes=True)),
        (4, lambda data: stream_of("zstd", data)),
    ],
    ids=["none", "gzip", "snappy, framed", "snappy", "zstd"],
)
def test_compressed_records_round_trip(
    broker: Settings, topic: str, reader: BoundedReader, codec: int, compress: Callable[[bytes], bytes]
) -> None:
    records = b"".join(record(number, *one) for number, one in enumerate(RECORDS))
    batch = batch_of(compress(records), codec, len(RECORDS))
    for first in (0, 3):
        assert produce(str(broker.bootstrap_servers), topic, 0, batch) == (0, first)
    found = list(reader.read(topic, 0, 1, 5))
    assert [one.offset for one in found] == [1, 2, 3, 4]
    assert [(one.key, one.value, one.headers) for one in found] == [*RECORDS[1:], *RECORDS[:2]]
    assert all(one.refused is None and one.timestamp_ms > 1_700_000_000_000 for one in found)


def test_committed_messages_are_those_that_kafka_python_reads(
    broker: Settings, topic: str, reader: BoundedReader
) -> None:
    servers = broker.bootstrap_servers
    with closing(KafkaProducer(bootstrap_servers=servers, transactional_id=topic)) as producer:
        producer.init_transactions()
        for messages, commit in ((2, False), (3, True), (1, False), (2, False), (40, True), (1, True)):
            producer.begin_transaction()
            for number in range(messages):
                producer.send(topic, b"%d" % number)
            producer.flush()
            producer.commit_transaction() if commit else producer.abort_transaction()
    with closing(KafkaConsumer(bootstrap_servers=servers, isolation_level="read_committed")) as consumer:
        place = TopicPartition(topic, 0)
        consumer.assign([place])
        consumer.seek(place, 0)
        expected: list[tuple[int, bytes]] = []
        while len(expected) < 44:
            expected += [(one.offset, one.value) for one in consumer.poll(1000).get(place, ())]
    end = expected[-1][0] + 1
    assert [(one.offset, one.value) for one in reader.read(topic, 0, 0, end)] == expected
    assert [one.offset for one in reader.read(topic, 0, 4, end)] == [one for one, _ in expected if one >= 4]
    with closing(BoundedReader(str(servers), committed=False)) as uncommitted:
        assert [one.offset for one in uncommitted.read(topic, 0, 0, 2)] == [0, 1]  # aborted


def test_bomb_is_refused_by_its_offset_and_its_neighbours_are_read(
    broker: Settings, topic: str, reader: BoundedReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    servers = str(broker.bootstrap_servers)
    for batch in (
        record(0, None, b"before"),
        gzip_bomb(60_000_000),
        gzip_bomb(10, 3_000_000),
        gzip_bomb(10, MAX_HEADERS),
    ):
        packed = batch if len(batch) > 100 else batch_of(batch)
        assert produce(servers, topic, 0, packed)[0] == 0
    before, value, headers, largest = reader.read(topic, 0, 0, 4)
    assert (before.value, before.refused, largest.refused, len(largest.headers)) == (b"before", None, None, MAX_HEADERS)
    assert (value.offset, value.value) == (1, None)
    assert "got 60,000,0" in str(value.refused)
    assert (headers.offset, headers.headers) == (2, [])
    assert "got 3,000,000" in str(headers.refused)

    monkeypatch.setattr(bounded_reader, "MAX_UNPACKED_BYTES", 300_000)
    records = b"".join(record(number, None, bytes(100_000)) for number in range(5))
    assert produce(servers, topic, 0, batch_of(gzip.compress(records), 1, 5)) == (0, 4)
    found = list(reader.read(topic, 0, 4, 9))
    assert [(one.offset, one.refused is None) for one in found] == [
        (4, True),
        (5, True),
        (6, False),
        (7, False),
        (8, False),
    ]
    assert "unpacks to more than 300,000 bytes" in str(found[-1].refused)


def test_damaged_batch_is_reported_with_its_offset() -> None:
    valid = batch_of(record(0, b"k", b"v"))
    parsed = bounded_reader._batches
    assert [one.base_offset for one in parsed(valid + valid[:40])] == [0]  # brokers may truncate the last batch
    with pytest.raises(ServiceError, match="offset 0 does not match its checksum"):
        list(parsed(valid[:-1] + b"?"))
    with pytest.raises(ServiceError, match="offset 0 is of message format 1, expected 2"):
        list(parsed(valid[:16] + b"\x01" + valid[17:]))
    for records in (b"\xff" * 12, record(0, b"k", b"v")[:-3], bytes(3)):
        (batch,) = parsed(batch_of(records))
        with pytest.raises(ServiceError, match="the batch at offset 0 is damaged"):
            list(batch.records())


def test_broker_that_is_not_the_leader_is_asked_again(
    broker: Settings, topic: str, reader: BoundedReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert produce(str(broker.bootstrap_servers), topic, 0, batch_of(record(0, *RECORDS[0]))) == (0, 0)
    manager: Any = reader._admin._manager
    run, not_leader = manager.run, NotLeaderForPartitionError.errno
    codes = [not_leader, not_leader]

    def with_code(fetch: Callable[[], Any]) -> Any:
        """The answer of the broker, with the next error code if one is left."""
        response = run(fetch)
        if codes:
            response.responses[0].partitions[0].error_code = codes.pop()
        return response

    monkeypatch.setattr(manager, "run", with_code)
    assert [one.value for one in reader.read(topic, 0, 0, 1)] == [b"first"]
    codes.append(not_leader)
    monkeypatch.setattr(bounded_reader, "TIMEOUT_MS", -1)
    with pytest.raises(NotLeaderForPartitionError, match=f"topic '{topic}' partition 0, offset 0"):
        list(reader.read(topic, 0, 0, 1))


def test_offset_out_of_range_is_an_error(broker: Settings, topic: str, reader: BoundedReader) -> None:
    with pytest.raises(OffsetOutOfRangeError):
        list(reader.read(topic, 0, 7, 9))
    assert reader.log_start(topic, 0) == 0
