"""The audit with a real broker: each possible difference between tables and topic."""

from contextlib import closing
from pathlib import Path

import pytest
from deltalake import DeltaTable
from kafka import KafkaProducer, TopicPartition
from kafka.admin import KafkaAdminClient

from streaming.errors import ServiceError
from streaming.jobs import audit_broker
from streaming.jobs.audit import AuditReport, Compared, ProblemKind, audit
from streaming.jobs.audit_broker import compare_with_broker
from streaming.pipeline.offsets import PartitionOffsets, TopicOffsets
from streaming.settings import Settings
from tests.conftest import imagestream
from tests.faults.harness import wait_until
from tests.producer.topics import create_topic, delete_topic
from tests.streaming.history import commit_batch, new_topic


@pytest.fixture
def settings(broker: Settings, tmp_path: Path) -> Settings:
    """A topic of one partition: five messages, an aborted transaction of two, and two messages; one row per message."""
    settings = broker.model_copy(update={"home": tmp_path, "topic": new_topic()})
    servers, topic = settings.bootstrap_servers, settings.topic
    create_topic(servers, topic)
    with (
        closing(KafkaProducer(bootstrap_servers=servers)) as plain,
        closing(KafkaProducer(bootstrap_servers=servers, transactional_id=topic)) as aborting,
    ):
        for _ in range(5):
            plain.send(topic, b"image").get(300)
        aborting.init_transactions()
        aborting.begin_transaction()
        for _ in range(2):
            aborting.send(topic, b"aborted")
        aborting.flush()
        aborting.abort_transaction()  # offsets 5, 6 and a marker, which the broker writes later
        offsets = TopicOffsets(str(servers), [topic])
        wait_until(
            lambda: offsets.read() == {(topic, 0): PartitionOffsets(0, 8)}, lambda: f"no marker: {offsets.read()}"
        )
        offsets.close()
        for _ in range(2):
            plain.send(topic, b"image").get(300)
    commit_batch(settings, 1, {0: (0, 5)})
    commit_batch(settings, 2, {0: (5, 10)}, holes={5, 6, 7})
    return settings


def audit_with_broker(settings: Settings) -> AuditReport:
    report = audit(settings)
    compare_with_broker(settings, str(settings.bootstrap_servers), report)
    return report


def ranges(report: AuditReport, kind: ProblemKind) -> list[tuple[int, int]]:
    return [(one.where["from"], one.where["to"]) for one in report.problems if one.kind is kind]


@pytest.mark.parametrize("window", [1, 3, 1000])
def test_consistent_history_is_clean(settings: Settings, monkeypatch: pytest.MonkeyPatch, window: int) -> None:
    monkeypatch.setattr(audit_broker, "WINDOW_OFFSETS", window)
    report = audit_with_broker(settings)
    assert report.clean
    assert report.compared == [Compared(settings.topic, 0, 0, 9, held=7, rows=7)]


def test_message_without_a_row_is_reported_even_in_a_recorded_hole(settings: Settings) -> None:
    commit_batch(settings, 3, {0: (10, 13)}, holes={11})
    with closing(KafkaProducer(bootstrap_servers=settings.bootstrap_servers)) as producer:
        for _ in range(3):
            producer.send(settings.topic, b"image").get(300)
    assert audit(settings).clean
    DeltaTable(settings.place.table("predictions")).delete("offset IN (2, 3)")
    report = audit_with_broker(settings)
    assert ranges(report, ProblemKind.GAP)[-2:] == [(2, 3), (11, 11)]
    assert "Kafka has offsets 11 to 11, which have no row" in report.problems[-1].text


def test_row_of_an_aborted_message_is_reported(settings: Settings) -> None:
    DeltaTable(settings.place.table("batches")).delete("batch_id = 2")
    DeltaTable(settings.place.table("predictions")).delete("batch_id = 2")
    commit_batch(settings, 3, {0: (5, 10)}, holes={7})
    assert audit(settings).clean
    report = audit_with_broker(settings)
    assert report.counts == {ProblemKind.NOT_IN_KAFKA: 1}
    assert ranges(report, ProblemKind.NOT_IN_KAFKA) == [(5, 6)]
    assert imagestream(settings, "audit", "--broker", code=1)["counts"] == {"not_in_kafka": 1}


def test_messages_deleted_by_kafka_are_not_compared(settings: Settings) -> None:
    with closing(KafkaAdminClient(bootstrap_servers=settings.bootstrap_servers)) as admin:
        admin.delete_records({TopicPartition(settings.topic, 0): 8})
        assert audit_with_broker(settings).compared == [Compared(settings.topic, 0, 8, 9, held=2, rows=2)]
        admin.delete_records({TopicPartition(settings.topic, 0): 10})
        (one,) = audit_with_broker(settings).compared
        assert (one.first, one.note) == (None, "Kafka no longer has any of it")
        delete_topic(admin, settings.topic)
    (one,) = audit_with_broker(settings).compared
    assert (one.first, one.note) == (None, "it is no longer in Kafka")


def test_unavailable_broker_is_reported(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streaming.jobs.audit_broker.TIMEOUT_MS", 100)
    with pytest.raises(ServiceError, match="cannot be read from the broker at 127.0.0.1:1"):
        compare_with_broker(settings, "127.0.0.1:1", AuditReport())
