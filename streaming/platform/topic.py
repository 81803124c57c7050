"""What Kafka says of a topic: its identity, and the offsets that it holds."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import monotonic, sleep
from typing import Any

from streaming.errors import ServiceError
from streaming.platform.kafka_client import connect

TIMEOUT_MS = 10_000
RETRY_S = 0.2


@dataclass(frozen=True)
class Topic:
    """A topic as it is now.

    Attributes:
        id: given when the topic was made, so that one made again under the same name has another.
        begins: partition → the first offset it still holds.
        ends: partition → one past its last offset.
    """

    name: str
    id: str
    begins: dict[int, int]
    ends: dict[int, int]


def describe_topic(bootstrap_servers: str, name: str) -> Topic:
    """The topic, made with the broker's defaults if it is not there.

    Raises:
        ServiceError: the broker does not answer, or does not let us.
    """
    from kafka.admin import NewTopic
    from kafka.errors import KafkaError, TopicAlreadyExistsError

    with _admin(bootstrap_servers) as admin:
        try:
            if name not in admin.list_topics():
                admin.create_topics([NewTopic(name, num_partitions=-1, replication_factor=-1)])
        except TopicAlreadyExistsError:
            pass  # another process was quicker
        except KafkaError as error:
            raise ServiceError(f"topic {name!r} is not there and cannot be made: {error}") from error
        described, begins, ends = _offsets_of(admin, name)
    return Topic(
        name,
        str(described["topic_id"]),
        {one.partition: found.offset for one, found in begins.items()},
        {one.partition: found.offset for one, found in ends.items()},
    )


def _offsets_of(admin: Any, name: str) -> tuple[Any, Any, Any]:
    """Description, first and end offsets; a topic only just made needs a moment until its partitions have leaders."""
    from kafka import TopicPartition
    from kafka.admin import OffsetSpec
    from kafka.errors import KafkaError

    give_up = monotonic() + TIMEOUT_MS / 1000
    while True:
        try:
            described = admin.describe_topics([name])[0]
            partitions = [TopicPartition(name, one["partition_index"]) for one in described["partitions"]]
            begins = admin.list_partition_offsets(dict.fromkeys(partitions, OffsetSpec.EARLIEST))
            ends = admin.list_partition_offsets(dict.fromkeys(partitions, OffsetSpec.LATEST))
        except KafkaError as error:
            if monotonic() > give_up:
                raise ServiceError(f"the offsets of topic {name!r} cannot be had: {error}") from error
        else:
            if partitions:
                return described, begins, ends
        sleep(RETRY_S)


def broker_answers(bootstrap_servers: str) -> bool:
    """Whether a broker answers within seconds."""
    try:
        with _admin(bootstrap_servers):
            return True
    except ServiceError:
        return False


@contextmanager
def _admin(bootstrap_servers: str) -> Iterator[Any]:
    from kafka.admin import KafkaAdminClient
    from kafka.errors import KafkaError

    try:
        admin = connect(
            KafkaAdminClient,
            bootstrap_servers=bootstrap_servers,
            request_timeout_ms=TIMEOUT_MS,
            bootstrap_timeout_ms=TIMEOUT_MS,
        )
    except (KafkaError, ValueError) as error:
        raise ServiceError(
            f"no Kafka broker answers at {bootstrap_servers} ({error}); "
            "start the home's own with 'imagestream broker start', or check --bootstrap-servers"
        ) from error
    try:
        yield admin
    finally:
        admin.close()
