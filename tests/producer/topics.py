"""Topics of a real broker and their messages."""

import time
from contextlib import closing
from typing import Any

from kafka import KafkaConsumer, TopicPartition
from kafka.admin import KafkaAdminClient, NewTopic

from producer.message import MAX_MESSAGE_BYTES


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


def create_topic(servers: str | None, topic: str, partitions: int = 1, **configs: object) -> None:
    """Create a topic; the names of `configs` have underscores instead of dots."""
    texts = {name.replace("_", "."): str(value) for name, value in configs.items()}
    with closing(KafkaAdminClient(bootstrap_servers=servers)) as admin:
        admin.create_topics([NewTopic(topic, num_partitions=partitions, replication_factor=1, topic_configs=texts)])
        wait_for_partitions(admin, topic, partitions)


def wait_for_partitions(admin: KafkaAdminClient, topic: str, partitions: int) -> None:
    """Wait until the broker's metadata has them, which is a moment after they were created."""
    while len(admin.describe_topics([topic])[0]["partitions"]) < partitions:
        time.sleep(0.01)
