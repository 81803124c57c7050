"""Topics of a real broker and their messages."""

import time
from contextlib import closing
from typing import Any

from kafka import KafkaConsumer, TopicPartition
from kafka.admin import ConfigResource, ConfigResourceType, KafkaAdminClient, NewPartitions, NewTopic, OffsetSpec
from kafka.errors import UnknownTopicOrPartitionError

from producer.message import MAX_MESSAGE_BYTES
from streaming.platform.topic import topic_configuration

POLL_S = 0.01


def messages(servers: str, topic: str) -> list[Any]:
    """The messages of the topic by partition, as kafka-python returns them."""
    consumer = KafkaConsumer(
        bootstrap_servers=servers, consumer_timeout_ms=300_000, max_partition_fetch_bytes=MAX_MESSAGE_BYTES
    )
    try:
        partitions = [TopicPartition(topic, number) for number in sorted(consumer.partitions_for_topic(topic) or ())]
        ends = consumer.end_offsets(partitions)
        consumer.assign(partitions)
        consumer.seek_to_beginning()
        return [next(consumer) for _ in range(sum(ends.values()))]
    finally:
        consumer.close()


# A broker answers changes before its own metadata has them. These functions wait for that.


def create_topic(servers: str | None, topic: str, partitions: int = 1, **configs: object) -> None:
    """Create a topic; the names of `configs` have underscores instead of dots."""
    with closing(KafkaAdminClient(bootstrap_servers=servers)) as admin:
        settings = _with_dots(configs)
        admin.create_topics([NewTopic(topic, num_partitions=partitions, replication_factor=1, topic_configs=settings)])
        _wait_for_partitions(admin, topic, partitions)


def add_partitions(admin: KafkaAdminClient, topic: str, total: int) -> None:
    admin.create_partitions({topic: NewPartitions(total_count=total)})
    _wait_for_partitions(admin, topic, total)


def configure_topic(admin: KafkaAdminClient, topic: str, **configs: object) -> None:
    """Change the configuration of a topic; the names of `configs` have underscores instead of dots."""
    settings = _with_dots(configs)
    admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, topic, settings)])
    while not settings.items() <= topic_configuration(admin, topic).items():
        time.sleep(POLL_S)


def delete_topic(admin: KafkaAdminClient, topic: str) -> None:
    admin.delete_topics([topic])
    while topic in admin.list_topics():
        time.sleep(POLL_S)


def _with_dots(configs: dict[str, object]) -> dict[str, str]:
    return {name.replace("_", "."): str(value) for name, value in configs.items()}


def _wait_for_partitions(admin: KafkaAdminClient, topic: str, partitions: int) -> None:
    ends = {TopicPartition(topic, number): OffsetSpec.LATEST for number in range(partitions)}
    while True:
        try:
            admin.list_partition_offsets(ends)  # repeated by the client until the leader knows that it is one
        except UnknownTopicOrPartitionError:
            time.sleep(POLL_S)
        else:
            return
