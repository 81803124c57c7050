"""Messages of third-party producers on one topic: Kafka's Java client and librdkafka."""

import subprocess
from collections import Counter
from contextlib import closing
from pathlib import Path

from confluent_kafka import KafkaError, Message, Producer

from streaming.images.dataset import digit_images
from streaming.platform.bounded_reader import BoundedReader
from streaming.platform.jars import broker_classpath
from streaming.platform.java import find_java
from streaming.settings import Settings
from tests.conftest import imagestream
from tests.faults.harness import Position, drain, rows
from tests.prepare import SET_UP
from tests.producer.topics import create_topic

PROGRAM = Path(__file__).with_name("ForeignProducer.java")
COMPRESSIONS = ("none", "gzip", "snappy", "lz4", "zstd")
TRANSACTION = "transaction"
NOTES = [("note", None), ("note", b"\x00\xff")]

Sent = list[tuple[Position, str]]  # partition and offset of each committed message, and its kind
Headers = list[tuple[str, bytes | None]]
Messages = list[tuple[bytes | None, bytes | None, Headers]]  # key, value, headers


def sent_by_java(settings: Settings, image: bytes, folder: Path) -> Sent:
    file = folder / "image"
    file.write_bytes(image)
    command = [find_java(SET_UP), "-cp", broker_classpath(settings.jars_dir), PROGRAM, settings.bootstrap_servers]
    done = subprocess.run([*map(str, command), settings.topic, str(file)], capture_output=True, text=True, check=True)
    lines = [line.split() for line in done.stdout.splitlines() if line[:1].isdigit()]
    return [((int(partition), int(offset)), kind) for partition, offset, kind in lines]


def sent_by_librdkafka(settings: Settings, image: bytes) -> Sent:
    """Send the same messages as `ForeignProducer.java`."""
    sent: Sent = []

    def send(producer: Producer, kind: str, messages: Messages) -> Sent:
        places: Sent = []

        def delivered(error: KafkaError | None, message: Message) -> None:
            assert error is None
            places.append(((message.partition(), message.offset()), kind))

        for key, value, headers in messages:
            producer.produce(settings.topic, value, key, headers=headers, on_delivery=delivered)
        assert producer.flush(30) == 0
        return places

    common = {"bootstrap.servers": settings.bootstrap_servers, "enable.idempotence": True, "linger.ms": 50}
    for kind in COMPRESSIONS:
        producer = Producer(common | {"compression.codec": kind})
        images = [(b"camera", image, [("ce_id", f"{kind}{number}".encode()), *NOTES]) for number in range(4)]
        sent += send(producer, kind, [*images, (None, b"\1\2\3", []), (b"tombstone", None, [])])
    producer = Producer(common | {"compression.codec": "lz4", "transactional.id": f"librdkafka-{settings.topic}"})
    producer.init_transactions(300)
    for number in range(3):
        producer.begin_transaction()
        places = send(producer, TRANSACTION, [(None, image, []), (b"", image, [])])
        if number == 1:
            producer.abort_transaction(300)
        else:
            producer.commit_transaction(300)
            sent += places
    return sent


def test_messages_of_java_and_librdkafka_producers_have_one_row_each(service: Settings, tmp_path: Path) -> None:
    create_topic(service.bootstrap_servers, service.topic, partitions=2, compression_type="producer")
    image = next(iter(digit_images(1, 300)))[2]
    by_producer = [sent_by_java(service, image, tmp_path), sent_by_librdkafka(service, image)]

    assert drain(service).restarts == 0
    columns = 'SELECT "partition", "offset", image_id, key, NULL AS reason FROM predictions'
    bad = 'SELECT "partition", "offset", image_id, key, reason FROM quarantine'
    found = {(row["partition"], row["offset"]): row for row in rows(service, f"{columns} UNION ALL {bad}")}
    assert found.keys() == {place for sent in by_producer for place, _ in sent}
    for sent in by_producer:
        assert Counter(kind for _, kind in sent) == dict.fromkeys(COMPRESSIONS, 6) | {TRANSACTION: 4}
        mine = [found[place] for place, _ in sent]
        assert Counter(row["reason"] for row in mine) == {None: 24, "not_an_image": 5, "missing": 5}
        ids = Counter(row["image_id"] for row in mine if row["key"] == b"camera")
        assert ids == Counter(f"{kind}{number}" for kind in COMPRESSIONS for number in range(4))
        assert Counter(row["key"] for row in mine) == {b"camera": 20, None: 7, b"tombstone": 5, b"": 2}
    report = imagestream(service, "audit", "--broker")
    assert (report["clean"], sum(one["held"] for one in report["compared"])) == (True, 68)

    with closing(BoundedReader(str(service.bootstrap_servers), committed=True)) as reader:
        headers = [
            one.headers
            for span in report["spans"]
            for one in reader.read(service.topic, span["partition"], 0, span["last"] + 1)
            if one.key == b"camera"
        ]
    assert len(headers) == 40
    assert all(one[1:] == NOTES for one in headers)
