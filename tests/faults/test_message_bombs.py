"""Messages that Spark cannot read: the stream continues, and neighbouring messages and the bad ones have rows."""

import os
from contextlib import closing
from pathlib import Path

from kafka import KafkaProducer

from examples.memory import MemoryWatch, Sample
from models.bundle import read_bundle
from streaming.images.dataset import digit_images
from streaming.jobs.audit import audit
from streaming.pipeline.preflight import needed_bytes, with_fixed_heap
from streaming.settings import Settings
from tests.conftest import imagestream
from tests.faults.harness import TIMEOUT_S, Stream, drain, rows
from tests.faults.record_batches import gzip_bomb, produce, zstd_bomb
from tests.forms import Record
from tests.producer.topics import create_topic
from tests.streaming.small_models import bundle_folder

RECORDS = 10  # of a batch

ANY_TIME = {
    "message.timestamp.type": "CreateTime",
    "message.timestamp.after.max.ms": str(2**63 - 1),
    "retention.ms": "-1",
}


BOMBS = {
    "600 MB in gzip": lambda: gzip_bomb(600_000_000),
    "six million headers": lambda: gzip_bomb(10, 6_000_000),
    "2 GB in zstd": lambda: zstd_bomb(2_000_000_000),
    "ten times 400 MB": lambda: zstd_bomb(400_000_000, RECORDS),
}


def test_batch_that_crashes_the_jvm_twice_is_read_outside_it(service: Settings, record: Record) -> None:
    servers = str(service.bootstrap_servers)
    create_topic(servers, service.topic, compression_type="producer")
    images = iter([data for _, _, data in digit_images(2 * len(BOMBS) + 2, 300)])
    good: list[int] = []
    bombs: list[int] = []
    with closing(KafkaProducer(bootstrap_servers=servers)) as producer:
        for bomb in [*BOMBS.values(), None]:
            good += [producer.send(service.topic, next(images)).get(300).offset for _ in range(2)]
            if bomb is not None:
                error, offset = produce(servers, service.topic, 0, bomb())
                assert error == 0
                bombs.append(offset)
    crashes = 0
    troubles: list[str] = []
    peaks: list[Sample] = []
    for _ in range(3):
        with Stream(service, until_drained=True) as stream, MemoryWatch(stream.process.pid) as watch:
            code = stream.process.wait(TIMEOUT_S)
        peaks.append(watch.peaks)
        crashes += code != 0
        troubles += [event["what"] for event in stream.events("trouble")]
        if not code:
            break
    assert (crashes, code) == (2, 0), stream.log_tail()
    # If the JVM survives its second failure for a moment, the second run reads the batch, otherwise the third.
    assert "batch 1 was started 2 times and never finished: reading it message by message" in troubles
    assert [row["offset"] for row in rows(service, 'SELECT "offset" FROM predictions ORDER BY 1')] == good
    bad = rows(service, 'SELECT "offset", stage, reason, detail, value, headers FROM quarantine ORDER BY 1')
    assert [row["offset"] for row in bad] == [*bombs, *range(bombs[-1] + 1, bombs[-1] + RECORDS)]
    assert {(row["stage"], row["reason"]) for row in bad} == {("read", "message_bomb")}
    assert all(row["value"] is None and not row["headers"] for row in bad)
    details = [row["detail"] for row in bad]
    assert "got 600,000,0" in details[0]
    assert "got 6,000,000" in details[1]
    assert "its batch unpacks to more than 1,073,741,824 bytes" in details[2]
    assert ["got 400,000,0" in one for one in details[3:]] == [True, True, *[False] * (RECORDS - 2)]
    assert details[-1] == details[2]
    assert imagestream(service, "audit", "--broker")["clean"]
    assert imagestream(service, "replay", "--dry-run")["wanted"] == 0  # no bytes to send

    assert all(java and others for java, others in peaks), "there are samples of each run"
    java, python = (size / 1e6 for size in max(peaks, key=sum))
    bundle = sum(len(content) for content in read_bundle(bundle_folder(Path(service.home), 1)).files.values())
    needed = needed_bytes(with_fixed_heap(service)[0], bundle, os.cpu_count() or 1) / 1e6
    peak = f"{java:,.0f} + {python:,.0f}"
    record("bombs: peak memory of JVM + Python, preflight's figure", f"≤ {needed:,.0f} MB", f"{peak} MB")
    assert java + python <= needed


def test_embedded_broker_refuses_bombs(broker: Settings, service: Settings) -> None:
    servers = str(broker.bootstrap_servers)
    create_topic(servers, service.topic)
    assert produce(servers, service.topic, 0, gzip_bomb(60_000_000)) == (10, -1)  # MESSAGE_TOO_LARGE
    assert produce(servers, service.topic, 0, gzip_bomb(600_000_000))[0] != 0  # more than its memory
    for bomb in (zstd_bomb(60_000_000), zstd_bomb(2_000_000_000), zstd_bomb(400_000_000, RECORDS)):
        assert produce(servers, service.topic, 0, bomb)[0] != 0
    assert produce(servers, service.topic, 0, gzip_bomb(1_000)) == (0, 0)


def test_timestamp_out_of_sparks_range_does_not_stop_the_stream(service: Settings) -> None:
    create_topic(str(service.bootstrap_servers), service.topic, **ANY_TIME)
    times = [1_714_996_800_000, 0, 1_714_996_800, 1_714_996_800_000_000, 1_714_996_800_000_000_000]
    image = next(iter(digit_images(1, 300)))[2]
    with closing(KafkaProducer(bootstrap_servers=service.bootstrap_servers)) as producer:
        for time_ms in times:
            producer.send(service.topic, image, timestamp_ms=time_ms).get(300)
    drained = drain(service)
    assert "reading it message by message" in drained.troubles[-1]
    found = rows(service, 'SELECT timestamp_ms, published_at IS NULL AS unknown FROM predictions ORDER BY "offset"')
    assert [(row["timestamp_ms"], row["unknown"]) for row in found] == [(one, one != times[0]) for one in times]
    assert audit(service).clean
