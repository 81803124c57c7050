"""Offsets that do not continue what was committed stop the stream; the message names the partition and the offsets."""

import json
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from kafka import KafkaProducer, TopicPartition
from kafka.admin import KafkaAdminClient, NewPartitions, NewTopic

from streaming.continuity import Accept, Continuity, check_checkpoint, check_topic, read_continuity
from streaming.errors import ServiceError
from streaming.pin import OffsetRange
from streaming.settings import Settings
from streaming.topic import describe_topic


@pytest.fixture
def admin(broker: Settings) -> Iterator[KafkaAdminClient]:
    client = KafkaAdminClient(bootstrap_servers=broker.bootstrap_servers)
    yield client
    client.close()


@pytest.fixture
def topic(admin: KafkaAdminClient) -> str:
    """A topic of two partitions."""
    name = f"continuity-{uuid4().hex[:8]}"
    admin.create_topics([NewTopic(name, num_partitions=2, replication_factor=1)])
    return name


def send(settings: Settings, topic: str, partition: int, count: int) -> None:
    producer = KafkaProducer(bootstrap_servers=settings.bootstrap_servers, acks="all")
    for number in range(count):
        producer.send(topic, b"%d" % number, partition=partition)
    producer.flush()
    producer.close()


def planned(checkpoint: Path, topic: str, ends: dict[int, int]) -> Path:
    """A checkpoint that says Spark has planned up to these offsets."""
    (checkpoint / "offsets").mkdir(parents=True)
    text = json.dumps({topic: {str(partition): end for partition, end in ends.items()}})
    (checkpoint / "offsets" / "0").write_text(f"v1\n{{}}\n{text}")
    (checkpoint / "metadata").write_text('{"id":"query"}')
    return checkpoint


def test_a_batch_that_continues_is_taken_and_one_that_repeats_or_skips_is_not() -> None:
    continuity = Continuity("images", Accept(), {0: 10})
    continuity.check([OffsetRange("images", 0, 10, 20), OffsetRange("images", 1, 0, 5)])
    continuity.advance([OffsetRange("images", 0, 10, 20)])
    with pytest.raises(ServiceError, match="partition 0: the next batch begins at offset 15, but 5 messages .* to 19"):
        continuity.check([OffsetRange("images", 0, 15, 30)])
    with pytest.raises(ServiceError, match="partition 0: 5 messages are missing, from offset 20 to 24; .*-loss"):
        continuity.check([OffsetRange("images", 0, 25, 30)])
    Continuity("images", Accept(loss=True), {0: 20}).check([OffsetRange("images", 0, 25, 30)])


def test_committed_batches_without_a_checkpoint_need_a_word(tmp_path: Path) -> None:
    continuity = Continuity("images", Accept(), {0: 10})
    with pytest.raises(ServiceError, match="no checkpoint .* twice; .*--resume-from-tables"):
        check_checkpoint(continuity, tmp_path / "spark", resume=False)
    check_checkpoint(continuity, tmp_path / "spark", resume=True)
    with pytest.raises(ServiceError, match="there is one in"):
        check_checkpoint(continuity, planned(tmp_path / "spark", "images", {0: 10}), resume=True)


def test_a_topic_that_goes_on_is_read_on(broker: Settings, topic: str, tmp_path: Path) -> None:
    send(broker, topic, 0, 5)
    found = describe_topic(str(broker.bootstrap_servers), topic)
    assert (found.begins, found.ends) == ({0: 0, 1: 0}, {0: 5, 1: 0})
    continuity = Continuity(topic, Accept(), {0: 3})
    checkpoint = planned(tmp_path / "spark", topic, {0: 3, 1: 0})
    check_topic(continuity, found, checkpoint)
    check_topic(continuity, found, checkpoint)  # its identity is remembered, and the same
    assert json.loads(continuity.starting_offsets(found)) == {topic: {"0": 3, "1": 0}}


def test_messages_that_retention_removed_are_counted(
    broker: Settings, admin: KafkaAdminClient, topic: str, tmp_path: Path
) -> None:
    send(broker, topic, 1, 10)
    admin.delete_records({TopicPartition(topic, 1): 7})
    found = describe_topic(str(broker.bootstrap_servers), topic)
    checkpoint = planned(tmp_path / "spark", topic, {0: 0, 1: 4})
    with pytest.raises(ServiceError, match="partition 1: 3 messages are lost, from offset 4 to 6: .*--accept-loss"):
        check_topic(Continuity(topic, Accept(), {1: 4}), found, checkpoint)
    check_topic(Continuity(topic, Accept(loss=True), {1: 4}), found, checkpoint)


def test_new_partitions_are_named(broker: Settings, admin: KafkaAdminClient, topic: str, tmp_path: Path) -> None:
    checkpoint = planned(tmp_path / "spark", topic, {0: 0, 1: 0})
    admin.create_partitions({topic: NewPartitions(total_count=4)})
    found = describe_topic(str(broker.bootstrap_servers), topic)
    with pytest.raises(ServiceError, match="new partitions: 2, 3; .*--accept-new-partitions"):
        check_topic(Continuity(topic, Accept()), found, checkpoint)
    check_topic(Continuity(topic, Accept(new_partitions=True)), found, checkpoint)


def test_a_topic_made_again_is_another_topic(
    broker: Settings, admin: KafkaAdminClient, topic: str, tmp_path: Path
) -> None:
    checkpoint = planned(tmp_path / "spark", topic, {0: 0, 1: 0})
    check_topic(Continuity(topic, Accept()), describe_topic(str(broker.bootstrap_servers), topic), checkpoint)
    admin.delete_topics([topic])
    while topic in admin.list_topics():
        pass
    again = describe_topic(str(broker.bootstrap_servers), topic)
    with pytest.raises(ServiceError, match="was made again .*--topic"):
        check_topic(Continuity(topic, Accept(loss=True)), again, checkpoint)


def test_a_topic_that_ends_before_what_is_committed_was_made_again(
    broker: Settings, topic: str, tmp_path: Path
) -> None:
    send(broker, topic, 0, 2)
    found = describe_topic(str(broker.bootstrap_servers), topic)
    with pytest.raises(ServiceError, match="partition 0 ends at offset 2, but messages up to 8 are committed"):
        check_topic(Continuity(topic, Accept(), {0: 9}), found, planned(tmp_path / "spark", topic, {0: 9, 1: 0}))


def test_without_tables_nothing_is_committed(tmp_path: Path) -> None:
    assert read_continuity(Settings(home=tmp_path), Accept()).committed == {}
