"""Messages that Spark cannot read: the stream lives, their neighbours have rows, and a row names their offset."""

from contextlib import closing

from kafka import KafkaProducer
from kafka.admin import KafkaAdminClient, NewTopic

from streaming.images.dataset import digit_images
from streaming.jobs.audit import audit
from streaming.settings import Settings
from tests.conftest import imagestream
from tests.faults.harness import Stream, drain, rows
from tests.faults.record_batches import gzip_bomb, produce

ANY_TIME = {
    "message.timestamp.type": "CreateTime",
    "message.timestamp.after.max.ms": str(2**63 - 1),
    "retention.ms": "-1",
}


def create_topic(settings: Settings, **configuration: str) -> None:
    with closing(KafkaAdminClient(bootstrap_servers=settings.bootstrap_servers)) as admin:
        admin.create_topics([NewTopic(settings.topic, 1, 1, topic_configs=configuration)])


def test_a_batch_that_ends_the_jvm_is_read_beside_it_after_two_deaths(service: Settings) -> None:
    create_topic(service, **{"compression.type": "producer"})
    images = [data for _, _, data in digit_images(6, 300)]
    servers = str(service.bootstrap_servers)
    with closing(KafkaProducer(bootstrap_servers=servers)) as producer:
        for number, bomb in enumerate([gzip_bomb(600_000_000), gzip_bomb(10, 6_000_000), None]):
            for data in images[2 * number : 2 * number + 2]:
                producer.send(service.topic, data).get(30)
            if bomb is not None:
                assert produce(servers, service.topic, 0, bomb)[0] == 0
    deaths = 0
    for _ in range(3):
        with Stream(service, until_drained=True) as stream:
            code = stream.process.wait(120)
        deaths += code != 0
        if not code:
            break
    assert (deaths, code) == (2, 0), stream.said()
    assert any("reading it message by message" in event["what"] for event in stream.events("trouble"))
    assert [row["offset"] for row in rows(service, 'SELECT "offset" FROM predictions ORDER BY 1')] == [0, 1, 3, 4, 6, 7]
    bad = rows(service, 'SELECT "offset", stage, reason, detail, value, headers FROM quarantine ORDER BY 1')
    assert [(row["offset"], row["stage"], row["reason"]) for row in bad] == [
        (2, "read", "message_bomb"),
        (5, "read", "message_bomb"),
    ]
    assert all(row["value"] is None and not row["headers"] for row in bad)
    assert "got 600,000,0" in bad[0]["detail"]
    assert "got 6,000,000" in bad[1]["detail"]
    assert imagestream(service, "audit", "--broker")["clean"]
    assert imagestream(service, "replay", "--dry-run")["wanted"] == 0  # there are no bytes to send


def test_the_embedded_broker_refuses_bombs_and_lives(broker: Settings, service: Settings) -> None:
    servers = str(broker.bootstrap_servers)
    create_topic(service)
    assert produce(servers, service.topic, 0, gzip_bomb(60_000_000)) == (10, -1)  # MESSAGE_TOO_LARGE
    assert produce(servers, service.topic, 0, gzip_bomb(600_000_000))[0] != 0  # more than its memory
    assert produce(servers, service.topic, 0, gzip_bomb(1_000)) == (0, 0)


def test_a_timestamp_that_spark_cannot_hold_does_not_stop_the_stream(service: Settings) -> None:
    create_topic(service, **ANY_TIME)
    times = [1_714_996_800_000, 0, 1_714_996_800, 1_714_996_800_000_000, 1_714_996_800_000_000_000]
    image = next(iter(digit_images(1, 300)))[2]
    with closing(KafkaProducer(bootstrap_servers=service.bootstrap_servers)) as producer:
        for time_ms in times:
            producer.send(service.topic, image, timestamp_ms=time_ms).get(30)
    drained = drain(service)
    assert "reading it message by message" in drained.troubles[-1]
    found = rows(service, 'SELECT timestamp_ms, published_at IS NULL AS unknown FROM predictions ORDER BY "offset"')
    assert [(row["timestamp_ms"], row["unknown"]) for row in found] == [(one, one != times[0]) for one in times]
    assert audit(service).clean
