"""Topics whose offsets have holes, by transactions, compaction and deletion, compared with an independent consumer."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import pytest
from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from kafka.admin import KafkaAdminClient

from streaming.jobs.audit import Span, audit
from streaming.pipeline.status import read_status
from streaming.settings import Settings
from tests.conftest import NewService, imagestream
from tests.faults.harness import Position, decisions, drain, rows, wait_until
from tests.producer.topics import create_topic

COMPACT = {
    "cleanup.policy": "compact",
    "segment.ms": "200",
    "min.cleanable.dirty.ratio": "0.01",
    "max.compaction.lag.ms": "500",
}


def transactional(settings: Settings) -> Any:
    producer = KafkaProducer(
        bootstrap_servers=settings.bootstrap_servers,
        transactional_id=f"test-{uuid4()}",
        transaction_timeout_ms=900_000,  # the broker's maximum: an open transaction stays open on a busy machine
        acks="all",
    )
    producer.init_transactions()
    return producer


def transaction(producer: Any, topic: str, partition: int, messages: int, *, commit: bool = True) -> None:
    """Send messages that are not images, followed by a transaction marker."""
    producer.begin_transaction()
    for number in range(messages):
        producer.send(topic, b"message %d" % number, partition=partition)
    producer.flush()
    producer.commit_transaction() if commit else producer.abort_transaction()


def in_kafka(settings: Settings, isolation: str = "read_committed") -> set[Position]:
    """The positions of messages in Kafka, by an independent client."""
    with closing(
        KafkaConsumer(
            bootstrap_servers=settings.bootstrap_servers, isolation_level=isolation, auto_offset_reset="earliest"
        )
    ) as consumer:
        partitions = [TopicPartition(settings.topic, one) for one in consumer.partitions_for_topic(settings.topic)]
        consumer.assign(partitions)
        ends = consumer.end_offsets(partitions)
        found: set[Position] = set()
        while any(consumer.position(one) < ends[one] for one in partitions):
            found |= {(one.partition, one.offset) for batch in consumer.poll(500).values() for one in batch}
    return found


def scored_positions(settings: Settings) -> list[Position]:
    found = rows(settings, 'SELECT "partition", "offset" FROM quarantine ORDER BY 1, 2')
    return [(row["partition"], row["offset"]) for row in found]


def check(settings: Settings, isolation: str = "read_committed") -> dict[str, Any]:
    """Exactly the messages in Kafka have one row each, and the audit is clean."""
    assert scored_positions(settings) == sorted(in_kafka(settings, isolation))
    report = imagestream(settings, "audit", "--broker")
    assert (report["clean"], report["unfinished"]) == (True, [])
    assert all(one["held"] == one["rows"] for one in report["compared"])
    return report


@dataclass(frozen=True)
class Transactions:
    """A topic of four partitions.

    0: aborted, committed, aborted, committed, aborted: holes at the start, in the middle and at the end
    1: only aborted
    2: three messages, an open transaction of one message, and one message after it
    3: a transaction of 30 messages, which spans micro-batches
    """

    settings: Settings
    producer: Any
    open: Any  # the producer of the open transaction


@pytest.fixture
def transactions(new_service: NewService) -> Iterator[Transactions]:
    settings = new_service()
    create_topic(str(settings.bootstrap_servers), settings.topic, partitions=4)
    topic = settings.topic
    with closing(transactional(settings)) as producer, closing(transactional(settings)) as opened:
        for messages, commit in ((2, False), (3, True), (2, False), (1, True), (1, False)):
            transaction(producer, topic, 0, messages, commit=commit)
        transaction(producer, topic, 1, 2, commit=False)
        with closing(KafkaProducer(bootstrap_servers=settings.bootstrap_servers)) as plain:
            for number in range(3):
                plain.send(topic, b"plain %d" % number, partition=2).get(300)
            opened.begin_transaction()
            opened.send(topic, b"open", partition=2)
            opened.flush()
            plain.send(topic, b"after", partition=2).get(300)
        transaction(producer, topic, 3, 30)
        yield Transactions(settings, producer, opened)


def test_committed_messages_have_one_row_and_aborted_ones_none(transactions: Transactions) -> None:
    settings = transactions.settings
    drained = drain(settings, images_per_batch=12)
    assert len(drained.batches) > 3
    assert (drained.troubles, drained.restarts) == ([], 0)
    assert [position for position in scored_positions(settings) if position[0] == 2] == [(2, 0), (2, 1), (2, 2)]

    status = read_status(settings)
    assert status.lag == 0
    assert [one.held for one in status.partitions] == [0, 0, 2, 0]

    transaction(transactions.producer, settings.topic, 1, 1, commit=False)
    assert [(batch.input_rows, batch.predicted_rows) for batch in drain(settings).batches] == [(0, 0)]

    transactions.open.commit_transaction()
    drain(settings)
    report = check(settings)
    topic = settings.topic
    assert [(one["messages"], one["holes"], one["proven"]) for one in report["spans"]] == [
        (4, 10, 10), (0, 5, 5), (5, 1, 1), (30, 1, 1),
    ]  # fmt: skip
    assert audit(settings).spans[3] == Span(topic, 3, 0, 30, 30, report["spans"][3]["batches"], 1, 1)
    starts = {one.log_start for batch in decisions(settings) for one in batch.ranges if one.rows < one.end - one.start}
    assert starts == {0}
    assert read_status(settings).partitions[2].held == 0


def test_read_uncommitted_scores_aborted_messages(transactions: Transactions, new_service: NewService) -> None:
    settings = transactions.settings
    transactions.open.commit_transaction()
    dirty = new_service().model_copy(update={"topic": settings.topic, "isolation": "read_uncommitted"})
    drain(dirty)
    assert scored_positions(dirty) == sorted(in_kafka(settings, "read_uncommitted"))
    assert {(0, 0), (1, 1)} <= {*scored_positions(dirty)}
    assert audit(dirty).clean
    found = imagestream(dirty, "audit", "--broker", code=1)  # reads only committed messages
    ends = [(p["where"]["partition"], p["where"]["from"], p["where"]["to"]) for p in found["problems"]]
    assert ends == [(0, 0, 1), (0, 7, 8), (0, 12, 12), (1, 0, 1)]
    assert {problem["kind"] for problem in found["problems"]} == {"not_in_kafka"}


def test_messages_deleted_after_fetching_are_scored_and_their_holes_unproven(service: Settings) -> None:
    create_topic(str(service.bootstrap_servers), service.topic)
    with closing(transactional(service)) as producer:
        with closing(KafkaProducer(bootstrap_servers=service.bootstrap_servers)) as plain:
            for number in range(20):
                plain.send(service.topic, b"plain %d" % number).get(300)
        transaction(producer, service.topic, 0, 3)
    expected = sorted(in_kafka(service))
    assert len(expected) == 23

    def delete(_: object) -> None:
        with closing(KafkaAdminClient(bootstrap_servers=service.bootstrap_servers)) as admin:
            admin.delete_records({TopicPartition(service.topic, 0): 22})

    drained = drain(service, images_per_batch=4, on_batch=delete)
    assert drained.restarts == 0
    assert scored_positions(service) == expected  # Spark fetched them with the first batch
    (span,) = audit(service).spans
    assert (span.messages, span.holes, span.proven) == (23, 1, 0)
    report = imagestream(service, "audit", "--broker")
    assert [(one["first"], one["held"], one["rows"]) for one in report["compared"]] == [(22, 1, 1)]


def test_remaining_messages_of_a_compacted_topic_are_scored(service: Settings) -> None:
    create_topic(str(service.bootstrap_servers), service.topic, **COMPACT)
    with closing(KafkaProducer(bootstrap_servers=service.bootstrap_servers)) as producer:
        for number in range(12):
            producer.send(service.topic, b"message %d" % number, key=b"key %d" % (number % 3)).get(300)

        def compacted() -> bool:
            producer.send(service.topic, b"another segment", key=b"another").get(300)
            return (0, 0) not in in_kafka(service)

        wait_until(compacted, lambda: "Kafka did not compact the topic")
    before = in_kafka(service)
    drain(service)
    assert in_kafka(service) <= {*scored_positions(service)} <= before  # Kafka may have compacted more in the meantime
    report = imagestream(service, "audit", "--broker")
    (span,) = report["spans"]
    assert span["holes"] == span["proven"] > 0
    assert report["compared"][0]["note"].startswith("compacted")
