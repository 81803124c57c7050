"""The positions of a stream in its tables, and the start of its next batch given the offsets in Kafka."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from kafka import KafkaProducer, TopicPartition
from kafka.admin import KafkaAdminClient

from streaming.errors import ConflictError, ServiceError
from streaming.images.dataset import digit_images, write_images
from streaming.pipeline.decisions import OffsetRange
from streaming.pipeline.finish import Tables, apply
from streaming.pipeline.positions import (
    Accept,
    FirstOffset,
    OffsetPlan,
    Positions,
    StreamIdentity,
    TopicAppearedError,
    check_not_shared,
    committed_ends,
    committed_offsets,
    identity_key,
    name_in_kafka,
    name_in_tables,
    number_of,
    plan_start,
    plan_topics,
    read_identity,
    read_positions,
)
from streaming.platform.topic import Topic, describe_topic
from streaming.settings import Settings
from tests.conftest import imagestream
from tests.producer.topics import add_partitions, create_topic, delete_topic
from tests.streaming.history import QUERY_ID, begin_stream, commit_batch, decision_of


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path)


def topic(begins: Mapping[int, int], ends: Mapping[int, int], id_: str = "one") -> Topic:
    return Topic("images", id_, dict(begins), dict(ends))


def at(ends: Mapping[int, int], name: str = "images", topics: Mapping[str, str] | None = None) -> Positions:
    return Positions("id", 5, {(name, partition): end for partition, end in ends.items()}, topics or {})


def starting(plan: OffsetPlan) -> Any:
    return json.loads(plan.starting_offsets())


# Names


@pytest.mark.parametrize(("number", "name"), [(1, "images"), (2, "images~2"), (12, "images~12")])
def test_recreated_topic_has_a_separate_name_in_the_tables(number: int, name: str) -> None:
    assert name_in_tables("images", number) == name
    assert (name_in_kafka(name), number_of(name)) == ("images", number)


def test_newest_topic_is_found_in_ends_and_topics() -> None:
    assert Positions().topic("images") == "images"
    assert at({0: 1}, "images~2").topic("images") == "images~2"
    assert at({0: 1}, "images~9", {"images~10": "id"}).topic("images") == "images~10"
    assert at({0: 1}, "other~3").topic("images") == "images"


# The identity of a stream


def test_stream_identity_round_trip(settings: Settings) -> None:
    assert read_identity(settings, "images") is None
    begin_stream(settings, {0: 4, 1: 0})
    assert read_identity(settings, "images") == StreamIdentity(
        QUERY_ID, "images", {"images": "topic-id"}, (FirstOffset("images", 0, 4), FirstOffset("images", 1, 0))
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "has format '2', expected 1"),
        ({"id": None}, "'id': "),
        ({"id": "x' OR '1' = '1"}, "bad id or first offsets"),
        ({"extra": 1}, "'extra': "),
        ({"first": [{"topic": "images", "partition": 0, "offset": -1}]}, "bad id or first offsets"),
        ({"first": [{"topic": "images", "partition": "0", "offset": 1}]}, "'first.0.partition': "),
        ({"topics": {"images": 7}}, "'topics.images': "),
    ],
)
def test_damaged_identity_is_refused_with_key_and_reason(
    settings: Settings, change: dict[str, Any], message: str
) -> None:
    begin_stream(settings)
    path = settings.work_dir / identity_key("images")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ServiceError) as error:
        read_identity(settings, "images")
    assert message in str(error.value)
    assert "streams/images/stream.json" in str(error.value)
    assert "\n" not in str(error.value)


# Positions in the tables


def positions_of(settings: Settings) -> Positions:
    identity = read_identity(settings, settings.topic)
    assert identity is not None
    return read_positions(settings, identity)


def test_positions_advance_only_with_complete_batches(settings: Settings) -> None:
    begin_stream(settings, {0: 4})
    assert positions_of(settings) == Positions(QUERY_ID, 0, {("images", 0): 4}, {"images": "topic-id"})
    decision = decision_of(settings, 1, {0: (4, 9)})
    assert positions_of(settings).ends == {("images", 0): 4}
    apply(decision, Tables(settings.place.tables), fresh=True)
    assert positions_of(settings) == Positions(QUERY_ID, 1, {("images", 0): 9}, {"images": "topic-id"})
    assert positions_of(settings) == Positions(QUERY_ID, 0, {("images", 0): 4}, {"images": "topic-id"}).after(decision)


def test_each_partition_is_at_the_end_of_its_last_batch(settings: Settings) -> None:
    begin_stream(settings, {0: 0, 1: 0, 2: 7})
    for number in range(1, 12):
        apply(
            decision_of(settings, number, {number % 2: (10 * number, 10 * number + 10)}),
            Tables(settings.place.tables),
            fresh=True,
        )
    assert positions_of(settings).number == 11
    assert positions_of(settings).of_topic("images") == {0: 110, 1: 120, 2: 7}


def test_batches_of_other_streams_are_ignored(settings: Settings) -> None:
    begin_stream(settings, {0: 5})
    commit_batch(settings, 90, {0: (0, 5)}, query_id="another")
    assert positions_of(settings) == Positions(QUERY_ID, 0, {("images", 0): 5}, {"images": "topic-id"})
    assert committed_offsets(settings) == ("images", {0: 5})


def test_topic_id_is_that_of_the_newest_batch(settings: Settings) -> None:
    begin_stream(settings, {0: 0})
    recreated = settings.model_copy(update={"topic": "images~2"})
    decision = replace(decision_of(recreated, 1, {0: (0, 3)}), topics={"images~2": "another-id"})
    apply(decision, Tables(settings.place.tables), fresh=True)
    assert positions_of(settings).topics == {"images": "topic-id", "images~2": "another-id"}
    assert committed_offsets(settings) == ("images~2", {0: 3})


def test_committed_offsets_without_a_stream(settings: Settings) -> None:
    assert committed_offsets(settings) == ("images", {})
    commit_batch(settings, 0, {0: (0, 5)})
    commit_batch(settings, 1, {0: (5, 9)}, upto="quarantine")
    commit_batch(settings, 0, {0: (5, 7)}, query_id="another")
    other = settings.model_copy(update={"topic": "other"})
    commit_batch(other, 1, {0: (0, 2)})
    assert committed_offsets(settings) == ("images", {0: 7})
    assert committed_offsets(other) == ("other", {0: 2})


def test_committed_ends_are_those_of_the_newest_topic_of_each_name(settings: Settings) -> None:
    assert committed_ends(settings) == {"images": {}}
    begin_stream(settings, {0: 4, 1: 0})
    recreated = settings.model_copy(update={"topic": "images~2"})
    for number, one in enumerate((settings, recreated, settings.model_copy(update={"topic": "faces"})), 1):
        decision = replace(decision_of(one, number, {0: (4, 4 + number)}), topics={one.topic: f"id-{number}"})
        apply(decision, Tables(settings.place.tables), fresh=True)
    assert list(committed_ends(settings).items()) == [("faces", {("faces", 0): 7}), ("images~2", {("images", 0): 6})]


def test_topic_that_another_stream_reads_is_rejected(settings: Settings) -> None:
    begin_stream(settings)
    check_not_shared(settings, {"images"})
    other = settings.model_copy(update={"topic": "faces"})
    check_not_shared(other, {"faces"})
    with pytest.raises(ConflictError, match="topic 'images' is read by stream 'images'"):
        check_not_shared(other, {"faces", "images"})
    begin_stream(other, stream_id="another")
    decision = replace(decision_of(settings, 1, {0: (0, 3)}), topics={"birds": "id", "cats": "id"})
    apply(decision, Tables(settings.place.tables), fresh=True)
    with pytest.raises(ConflictError, match="topic 'birds'"):
        check_not_shared(other, {"cats", "faces", "birds"})


def test_unreadable_table_is_named(settings: Settings) -> None:
    commit_batch(settings, 0, {0: (0, 5)})
    for file in (Path(settings.place.tables) / "batches" / "_delta_log").iterdir():
        file.write_text("{")
    with pytest.raises(ServiceError, match=r"table batches in .* cannot be read"):
        committed_offsets(settings)


# The start


def test_nothing_is_accepted_by_default() -> None:
    assert Accept() == Accept(loss=False, new_topic=False)


def test_stream_resumes_and_reads_new_partitions_from_the_start() -> None:
    plan = plan_start(at({0: 10, 1: 2}), topic({0: 0, 1: 0, 2: 0}, {0: 20, 1: 2, 2: 8}), Accept())
    assert starting(plan) == {"images": {"0": 10, "1": 2, "2": 0}}
    assert (plan.stream, plan.number, plan.topics) == ("id", 5, {"images": "one"})


def test_plan_before_the_first_batch() -> None:
    plan = plan_start(Positions(), topic({0: 0}, {0: 9}), Accept())
    assert (plan.stream, plan.number, plan.starts) == ("", 0, {("images", 0): 0})


def test_starts_and_topics_of_a_plan() -> None:
    plan = plan_start(at({0: 10}), topic({0: 0, 1: 0}, {0: 20, 1: 8}), Accept())
    assert plan.starts == {("images", 0): 10, ("images", 1): 0}
    assert plan.starts is not plan.starts
    assert plan.kafka_topics == {"images": ("images", "one")}


def test_topic_at_the_committed_offsets_is_the_same() -> None:
    positions = at({0: 10}, "images~2", {"images~2": "one"})
    plan = plan_start(positions, topic({0: 10}, {0: 10}), Accept())
    assert (plan.names, starting(plan)) == ({"images": "images~2"}, {"images": {"0": 10}})


def test_message_removed_by_retention_is_a_loss_until_accepted() -> None:
    found = topic({0: 11, 1: 0}, {0: 20, 1: 4})
    with pytest.raises(
        ServiceError, match="partition 0: loss of up to 1 message, from offset 10 to 10: .*--accept-loss"
    ):
        plan_start(at({0: 10, 1: 0}), found, Accept(new_topic=True))
    plan = plan_start(at({0: 10, 1: 0}), found, Accept(loss=True))
    assert starting(plan) == {"images": {"0": 11, "1": 0}}
    assert plan.check([OffsetRange("images", 0, 11, 15)]) == [OffsetRange("images", 0, 10, 11)]


def test_missing_messages_of_a_new_partition_are_a_loss() -> None:
    with pytest.raises(ServiceError, match="partition 1: loss of up to 3 messages, from offset 0 to 2: "):
        plan_start(at({0: 10}), topic({0: 0, 1: 3}, {0: 10, 1: 9}), Accept())
    plan = plan_start(at({0: 10}), topic({0: 0, 1: 1}, {0: 10, 1: 9}), Accept(loss=True))
    assert plan.check([OffsetRange("images", 1, 1, 4)]) == [OffsetRange("images", 1, 0, 1)]


def test_first_partition_with_a_loss_is_named() -> None:
    with pytest.raises(ServiceError, match="partition 0: loss of up to 2 messages"):
        plan_start(at({1: 10, 0: 10}), topic({1: 15, 0: 12}, {1: 20, 0: 20}), Accept())


@pytest.mark.parametrize("ends", [{0: 9}, {}], ids=["shorter", "gone"])
def test_topic_shorter_than_committed_was_recreated(ends: dict[int, int]) -> None:
    problem = "ends at offset 9" if ends else "no longer exists"
    found = topic(dict.fromkeys(ends, 0), ends)
    with pytest.raises(ServiceError, match=f"partition 0 {problem}, but messages up to 9 are committed.*'images~2'"):
        plan_start(at({0: 10}), found, Accept(loss=True))


def test_first_partition_shorter_than_committed_is_named() -> None:
    with pytest.raises(ServiceError, match="partition 0 ends at offset 1"):
        plan_start(at({1: 10, 0: 10}), topic({0: 0, 1: 0}, {0: 1, 1: 1}), Accept())


def test_topic_with_another_id_was_recreated() -> None:
    found = topic({0: 3}, {0: 100}, "two")
    positions = at({0: 10}, "images~2", {"images~2": "one"})
    with pytest.raises(ServiceError, match=r"recreated \(id two, before one\), .*--accept-new-topic.*'images~3'"):
        plan_start(positions, found, Accept(loss=True))
    plan = plan_start(positions, found, Accept(new_topic=True))
    assert (plan.topics, plan.number) == ({"images~3": "two"}, 5)
    assert starting(plan) == {"images": {"0": 3}}
    assert plan.check([OffsetRange("images~3", 0, 3, 5)]) == []


def test_unknown_topic_id_is_not_a_change() -> None:
    plan = plan_start(at({0: 10}, topics={"images": ""}), topic({0: 0}, {0: 10}, "two"), Accept())
    assert plan.topics == {"images": "two"}


def test_topics_are_planned_together_and_new_ones_from_the_start() -> None:
    positions = at({0: 10}, topics={"images": "one"})
    other = Topic("other", "other-id", {0: 7, 1: 0}, {0: 9, 1: 4})
    plan = plan_topics(positions, [topic({0: 0}, {0: 20}), other], Accept())
    assert plan.topics == {"images": "one", "other": "other-id"}
    assert starting(plan) == {"images": {"0": 10}, "other": {"0": 7, "1": 0}}
    assert plan.check([OffsetRange("images", 0, 10, 12), OffsetRange("other", 0, 7, 9)]) == []  # no loss
    known = Positions("id", 5, {("images", 0): 10, ("other", 0): 3}, {"images": "one", "other": "other-id"})
    with pytest.raises(ServiceError, match="'other' partition 0: loss of up to 4 messages"):
        plan_topics(known, [topic({0: 0}, {0: 20}), other], Accept())


# A micro-batch


def plan_of(ends: Mapping[int, int]) -> OffsetPlan:
    return OffsetPlan("id", 5, "images", ends, topic(dict.fromkeys(ends, 0), ends))


def test_every_range_must_start_where_its_partition_ended() -> None:
    valid = [OffsetRange("images", 0, 10, 12), OffsetRange("images", 1, 0, 3), OffsetRange("images", 2, 7, 8)]
    assert plan_of({0: 10, 1: 0, 2: 7}).check(valid) == []
    for number, wrong in ((1, OffsetRange("images", 1, 1, 3)), (2, OffsetRange("images", 2, 6, 8))):
        with pytest.raises(ServiceError, match=f"partition {number}: the next batch must begin at .* none of it"):
            plan_of({0: 10, 1: 0, 2: 7}).check([*valid[:number], wrong, *valid[number + 1 :]])


def test_partition_added_while_running_starts_at_its_first_message() -> None:
    assert plan_of({0: 10}).check([OffsetRange("images", 3, 0, 4)]) == []
    with pytest.raises(ServiceError, match="must begin at offset 0, but Spark planned one from 1"):
        plan_of({0: 10}).check([OffsetRange("images", 3, 1, 4)])


def test_range_of_a_new_topic_needs_a_new_plan() -> None:
    with pytest.raises(TopicAppearedError, match="'images~2'"):
        plan_of({0: 10}).check([OffsetRange("images~2", 0, 10, 12)])


def test_complete_batch_advances_only_its_partitions() -> None:
    plan = plan_of({0: 10, 1: 4})
    plan.advance([OffsetRange("images", 0, 10, 20), OffsetRange("images", 2, 0, 3)])
    assert plan.number == 6
    assert plan.check([OffsetRange("images", 0, 20, 21), OffsetRange("images", 1, 4, 5)]) == []
    assert plan.check([OffsetRange("images", 2, 3, 4)]) == []
    with pytest.raises(ServiceError, match="must begin at offset 20"):
        plan.check([OffsetRange("images", 0, 10, 20)])


def test_lost_range_is_left_out_once() -> None:
    plan = plan_start(at({0: 10}), topic({0: 15}, {0: 40}), Accept(loss=True))
    first, second = [OffsetRange("images", 0, 15, 20)], [OffsetRange("images", 0, 20, 30)]
    assert plan.check(first) == [OffsetRange("images", 0, 10, 15)]
    plan.advance(first)
    assert plan.check(second) == []


# With a real broker


@pytest.fixture
def admin(broker: Settings) -> Iterator[KafkaAdminClient]:
    client = KafkaAdminClient(bootstrap_servers=broker.bootstrap_servers)
    yield client
    client.close()


@pytest.fixture
def name(broker: Settings) -> str:
    """A topic of two partitions."""
    name = f"positions-{uuid4().hex[:8]}"
    create_topic(str(broker.bootstrap_servers), name, partitions=2)
    return name


def send(settings: Settings, topic: str, partition: int, count: int) -> None:
    producer = KafkaProducer(bootstrap_servers=settings.bootstrap_servers, acks="all")
    for number in range(count):
        producer.send(topic, b"%d" % number, partition=partition)
    producer.flush()
    producer.close()


def test_continued_topic_grows_and_loses_messages(broker: Settings, admin: KafkaAdminClient, name: str) -> None:
    servers = str(broker.bootstrap_servers)
    send(broker, name, 1, 10)
    found = describe_topic(servers, name)
    assert (found.begins, found.ends) == ({0: 0, 1: 0}, {0: 0, 1: 10})
    positions = at({0: 0, 1: 4}, name, {name: found.id})
    assert starting(plan_start(positions, found, Accept())) == {name: {"0": 0, "1": 4}}

    add_partitions(admin, name, 3)
    grown = describe_topic(servers, name)
    assert starting(plan_start(positions, grown, Accept())) == {name: {"0": 0, "1": 4, "2": 0}}

    admin.delete_records({TopicPartition(name, 1): 7})
    shorter = describe_topic(servers, name)
    with pytest.raises(
        ServiceError, match="partition 1: loss of up to 3 messages, from offset 4 to 6: .*--accept-loss"
    ):
        plan_start(positions, shorter, Accept())
    assert starting(plan_start(positions, shorter, Accept(loss=True))) == {name: {"0": 0, "1": 7, "2": 0}}


def test_recreated_topic_is_another_topic(broker: Settings, admin: KafkaAdminClient, name: str) -> None:
    before = describe_topic(str(broker.bootstrap_servers), name)
    delete_topic(admin, name)
    recreated = describe_topic(str(broker.bootstrap_servers), name)
    positions = at({0: 0}, name, {name: before.id})
    with pytest.raises(ServiceError, match=f"was recreated .*--accept-new-topic; .* '{name}~2'"):
        plan_start(positions, recreated, Accept(loss=True))
    assert plan_start(positions, recreated, Accept(new_topic=True)).topics == {f"{name}~2": recreated.id}


def test_loss_and_recreated_topic_stop_the_stream_until_accepted(
    service: Settings, admin: KafkaAdminClient, tmp_path: Path
) -> None:
    def publish(count: int) -> None:
        folder = write_images(tmp_path / uuid4().hex, digit_images(count, skip=1_000))
        imagestream(service, "publish", folder)

    create_topic(service.bootstrap_servers, service.topic)
    publish(3)
    imagestream(service, "stream", "--until-drained")
    publish(4)
    admin.delete_records({TopicPartition(service.topic, 0): 5})
    refused = imagestream(service, "stream", "--until-drained", code=1)
    assert "loss of up to 2 messages, from offset 3 to 4" in refused["stderr"]
    assert imagestream(service, "stream", "--until-drained", "--accept-loss")["input"] == 2

    delete_topic(admin, service.topic)
    create_topic(service.bootstrap_servers, service.topic)
    publish(6)
    refused = imagestream(service, "stream", "--until-drained", code=1)
    assert "--accept-new-topic" in refused["stderr"]
    assert imagestream(service, "stream", "--until-drained", "--accept-new-topic")["input"] == 6
    assert imagestream(service, "stream", "--until-drained")["input"] == 0  # the new topic is now recorded

    recreated = f"{service.topic}~2"
    report = imagestream(service, "audit")
    assert report["clean"]
    assert report["left_out"] == [{"topic": service.topic, "partition": 0, "from": 3, "to": 4}]
    assert {span["topic"]: span["messages"] for span in report["spans"]} == {service.topic: 5, recreated: 6}
    status = imagestream(service, "status", code=1)  # no stream is running
    assert [(one["committed"], one["lag"]) for one in status["partitions"]] == [(6, 0)]
