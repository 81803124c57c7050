"""Messages of producers that are not ours: Kafka's own in Java."""

import subprocess
from collections import Counter
from contextlib import closing
from pathlib import Path

from kafka.admin import KafkaAdminClient, NewTopic

from streaming.images.dataset import digit_images
from streaming.platform.bounded_reader import BoundedReader
from streaming.platform.jars import broker_classpath
from streaming.platform.java import find_java
from streaming.settings import Settings
from tests.conftest import imagestream
from tests.faults.harness import drain, rows
from tests.services import SET_UP

PROGRAM = Path(__file__).with_name("ForeignProducer.java")


def test_messages_of_a_java_producer_have_one_row_each(service: Settings, tmp_path: Path) -> None:
    with closing(KafkaAdminClient(bootstrap_servers=service.bootstrap_servers)) as admin:
        admin.create_topics([NewTopic(service.topic, 2, 1, topic_configs={"compression.type": "producer"})])
    image = tmp_path / "digit.png"
    image.write_bytes(next(iter(digit_images(1, 300)))[2])
    command = [find_java(SET_UP), "-cp", broker_classpath(service.jars_dir), PROGRAM, service.bootstrap_servers]
    done = subprocess.run([*map(str, command), service.topic, str(image)], capture_output=True, text=True, check=True)
    sent = [line.split() for line in done.stdout.splitlines() if line[:1].isdigit()]
    assert Counter(kind for _, _, kind in sent) == {
        "none": 6, "gzip": 6, "snappy": 6, "lz4": 6, "zstd": 6, "transaction": 4,
    }  # fmt: skip

    assert drain(service).restarts == 0
    columns = 'SELECT "partition", "offset", image_id, key, NULL AS reason FROM predictions'
    bad = 'SELECT "partition", "offset", image_id, key, reason FROM quarantine'
    found = {(row["partition"], row["offset"]): row for row in rows(service, f"{columns} UNION ALL {bad}")}
    assert found.keys() == {(int(partition), int(offset)) for partition, offset, _ in sent}
    assert Counter(row["reason"] for row in found.values()) == {None: 24, "not_an_image": 5, "missing": 5}
    ids = Counter(row["image_id"] for row in found.values() if row["key"] == b"camera")
    assert ids == Counter(f"{kind}{n}" for kind in ("none", "gzip", "snappy", "lz4", "zstd") for n in range(4))
    assert Counter(row["key"] for row in found.values()) == {b"camera": 20, None: 7, b"tombstone": 5, b"": 2}
    report = imagestream(service, "audit", "--broker")
    assert (report["clean"], sum(one["held"] for one in report["compared"])) == (True, 34)

    with closing(BoundedReader(str(service.bootstrap_servers), committed=True)) as reader:
        headers = [
            one.headers
            for span in report["spans"]
            for one in reader.read(service.topic, span["partition"], 0, span["last"] + 1)
            if one.key == b"camera"
        ]
    assert {tuple(one[1:]) for one in headers} == {(("note", None), ("note", b"\x00\xff"))}
