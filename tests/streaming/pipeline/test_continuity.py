"""Offsets that do not continue what was committed stop the stream; the message names the partition and the offsets."""

import json
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from kafka import KafkaProducer, TopicPartition
from kafka.admin import KafkaAdminClient, NewPartitions, NewTopic

from streaming.errors import ServiceError
from streaming.images.dataset import digit_images, write_images
from streaming.pipeline.continuity import (
    Accept,
    Continuity,
    Start,
    check_checkpoint,
    check_topic,
    read_continuity,
    set_aside,
)
from streaming.pipeline.incarnation import Incarnation, read_incarnation, write_incarnation
from streaming.pipeline.offsets import committed_offsets
from streaming.pipeline.pin import OffsetRange
from streaming.platform.topic import describe_topic
from streaming.settings import Settings
from tests.conftest import imagestream
from tests.streaming.history import commit_batch


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
    continuity = Continuity("images", {0: 10})
    continuity.check([OffsetRange("images", 0, 10, 20), OffsetRange("images", 1, 0, 5)])
    continuity.advance([OffsetRange("images", 0, 10, 20)])
    with pytest.raises(ServiceError, match="partition 0: the next batch begins at offset 15, but 5 messages .* to 19"):
        continuity.check([OffsetRange("images", 0, 15, 30)])
    with pytest.raises(ServiceError, match="partition 0: 5 messages are missing, from offset 20 to 24; .*-loss"):
        continuity.check([OffsetRange("images", 0, 25, 30)])
    told = Continuity("images", {0: 20}, Accept(loss=True)).check([OffsetRange("images", 0, 25, 30)])
    assert told == [OffsetRange("images", 0, 20, 25)]


def test_committed_batches_without_a_checkpoint_need_a_word(tmp_path: Path) -> None:
    continuity = Continuity("images", {0: 10})
    with pytest.raises(ServiceError, match="no checkpoint .* twice; .*--resume-from-tables"):
        check_checkpoint(continuity, tmp_path / "spark", resume=False)
    check_checkpoint(continuity, tmp_path / "spark", resume=True)
    with pytest.raises(ServiceError, match="there is one in"):
        check_checkpoint(continuity, planned(tmp_path / "spark", "images", {0: 10}), resume=True)


def test_a_topic_that_goes_on_is_read_on(broker: Settings, topic: str, tmp_path: Path) -> None:
    send(broker, topic, 0, 5)
    found = describe_topic(str(broker.bootstrap_servers), topic)
    assert (found.begins, found.ends) == ({0: 0, 1: 0}, {0: 5, 1: 0})
    continuity = Continuity(topic, {0: 3})
    checkpoint = planned(tmp_path / "spark", topic, {0: 3, 1: 0})
    start = check_topic(continuity, found, checkpoint, None)
    assert start == Start(continuity, Incarnation(found.id), anew=False)
    assert check_topic(continuity, found, checkpoint, start.incarnation) == start
    assert json.loads(start.starting_offsets(found)) == {topic: {"0": 3, "1": 0}}


def test_messages_that_retention_removed_are_counted(
    broker: Settings, admin: KafkaAdminClient, topic: str, tmp_path: Path
) -> None:
    send(broker, topic, 1, 10)
    admin.delete_records({TopicPartition(topic, 1): 7})
    found = describe_topic(str(broker.bootstrap_servers), topic)
    checkpoint = planned(tmp_path / "spark", topic, {0: 0, 1: 4})
    with pytest.raises(ServiceError, match="partition 1: 3 messages are lost, from offset 4 to 6: .*--accept-loss"):
        check_topic(Continuity(topic, {1: 4}), found, checkpoint, None)
    start = check_topic(Continuity(topic, {1: 4}, Accept(loss=True)), found, checkpoint, None)
    assert start.anew
    assert json.loads(start.starting_offsets(found)) == {topic: {"0": 0, "1": 7}}


def test_new_partitions_are_named(broker: Settings, admin: KafkaAdminClient, topic: str, tmp_path: Path) -> None:
    checkpoint = planned(tmp_path / "spark", topic, {0: 0, 1: 0})
    admin.create_partitions({topic: NewPartitions(total_count=4)})
    found = describe_topic(str(broker.bootstrap_servers), topic)
    with pytest.raises(ServiceError, match="new partitions: 2, 3; .*--accept-new-partitions"):
        check_topic(Continuity(topic), found, checkpoint, None)
    start = check_topic(Continuity(topic, accept=Accept(new_partitions=True)), found, checkpoint, None)
    assert not start.anew


def test_a_topic_made_again_is_another_topic(
    broker: Settings, admin: KafkaAdminClient, topic: str, tmp_path: Path
) -> None:
    before = Incarnation(describe_topic(str(broker.bootstrap_servers), topic).id)
    admin.delete_topics([topic])
    while topic in admin.list_topics():
        pass
    again = describe_topic(str(broker.bootstrap_servers), topic)
    checkpoint = planned(tmp_path / "spark", topic, {0: 0, 1: 0})
    with pytest.raises(ServiceError, match=f"was made again .*--accept-new-topic, .* as topic '{topic}~2'"):
        check_topic(Continuity(topic, {0: 3}, Accept(loss=True)), again, checkpoint, before)
    start = check_topic(Continuity(topic, {0: 3}, Accept(new_topic=True)), again, checkpoint, before)
    assert (start.continuity.topic, start.continuity.committed, start.anew) == (f"{topic}~2", {}, True)
    assert start.incarnation == Incarnation(again.id, 2)


def test_a_topic_that_ends_before_what_is_committed_was_made_again(
    broker: Settings, topic: str, tmp_path: Path
) -> None:
    send(broker, topic, 0, 2)
    found = describe_topic(str(broker.bootstrap_servers), topic)
    checkpoint = planned(tmp_path / "spark", topic, {0: 9, 1: 0})
    with pytest.raises(ServiceError, match="partition 0 ends at offset 2, but messages up to 8 are committed"):
        check_topic(Continuity(topic, {0: 9}), found, checkpoint, None)


def test_a_checkpoint_set_aside_leaves_room_for_another(tmp_path: Path) -> None:
    for _ in range(2):
        (tmp_path / "spark").mkdir()
        set_aside(tmp_path / "spark")
    set_aside(tmp_path / "spark")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["spark.aside-1", "spark.aside-2"]


def test_without_tables_nothing_is_committed(tmp_path: Path) -> None:
    found = read_continuity(Settings(home=tmp_path), Accept())
    assert (found.topic, found.committed) == ("images", {})


def test_the_tables_tell_which_topic_of_its_name_was_read_last(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    commit_batch(settings, 0, {0: (0, 5)})
    commit_batch(settings.model_copy(update={"topic": "images~2"}), 1, {0: (0, 3)})
    assert committed_offsets(settings) == ("images~2", {0: 3})
    write_incarnation(settings, Incarnation("id", 3))
    assert committed_offsets(settings) == ("images~3", {})
    assert read_incarnation(settings) == Incarnation("id", 3)


def test_a_damaged_memory_of_the_topic_is_named(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    assert read_incarnation(settings) is None
    write_incarnation(settings, Incarnation("id"))
    path = settings.checkpoints_dir / "images" / "topic.json"
    path.write_text("[")
    with pytest.raises(ServiceError, match=r"topic\.json, .* is damaged"):
        read_incarnation(settings)


def test_lost_messages_and_a_topic_made_again_stop_the_stream_until_they_are_accepted(
    service: Settings, admin: KafkaAdminClient, tmp_path: Path
) -> None:
    def publish(count: int) -> None:
        folder = write_images(tmp_path / uuid4().hex, digit_images(count, skip=1_000))
        imagestream(service, "publish", folder)

    admin.create_topics([NewTopic(service.topic, num_partitions=1, replication_factor=1)])
    publish(3)
    imagestream(service, "stream", "--until-drained")
    publish(4)
    admin.delete_records({TopicPartition(service.topic, 0): 5})
    refused = imagestream(service, "stream", "--until-drained", code=1)
    assert "2 messages are lost, from offset 3 to 4" in refused["stderr"]
    assert imagestream(service, "stream", "--until-drained", "--accept-loss")["input"] == 2

    admin.delete_topics([service.topic])
    while service.topic in admin.list_topics():
        pass
    admin.create_topics([NewTopic(service.topic, num_partitions=1, replication_factor=1)])
    publish(6)
    refused = imagestream(service, "stream", "--until-drained", code=1)
    assert "--accept-new-topic" in refused["stderr"]
    assert imagestream(service, "stream", "--until-drained", "--accept-new-topic")["input"] == 6

    again = f"{service.topic}~2"
    report = imagestream(service, "audit")
    assert report["clean"]
    assert report["left_out"] == [{"topic": service.topic, "partition": 0, "from": 3, "to": 4}]
    assert {span["topic"]: span["messages"] for span in report["spans"]} == {service.topic: 5, again: 6}
    status = imagestream(service, "status", code=1)  # no stream runs any more
    assert [(one["committed"], one["lag"]) for one in status["partitions"]] == [(6, 0)]
