"""What Kafka says of a topic: its identity, and the offsets that it holds."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from time import monotonic, sleep, time
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from producer.message import TOPIC_CONFIGURATION
from streaming.errors import NotFoundError, ServiceError, UnavailableError
from streaming.platform.kafka_client import connect
from streaming.platform.kafka_probe import RefusedError, check_broker

if TYPE_CHECKING:
    from datetime import datetime

TIMEOUT_MS = 10_000
RETRY_S = 0.2
OPEN: Mapping[str, Any] = MappingProxyType({})  # the arguments of a client that talks to an open broker
TOPIC_AUTHORIZATION_FAILED = 29  # Kafka's error codes
UNKNOWN_TOPIC = 3


class Right(StrEnum):
    """What one may be allowed to do with a topic, as Kafka's ACLs call it; each brings `Describe` with it."""

    READ = "READ"
    WRITE = "WRITE"


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


@dataclass(frozen=True)
class Subscription:
    """The topics that a stream reads: those of these names, or all whose whole name matches a pattern.

    Attributes:
        pattern: a regular expression, as Java and Python both read it.
    """

    topics: tuple[str, ...] = ()
    pattern: str | None = None

    def __str__(self) -> str:
        return ",".join(self.topics) if self.pattern is None else f"pattern {self.pattern}"

    def includes(self, name: str) -> bool:
        """Whether it reads a topic of this name."""
        return name in self.topics if self.pattern is None else re.fullmatch(self.pattern, name) is not None

    @property
    def spark_option(self) -> tuple[str, str]:
        """The option of Spark's Kafka source, and its value."""
        return ("subscribe", ",".join(self.topics)) if self.pattern is None else ("subscribePattern", self.pattern)


def describe_topics(
    bootstrap_servers: str, subscription: Subscription, client: Mapping[str, Any] = OPEN
) -> list[Topic]:
    """The topics of a subscription; those that it names are made if they are not there. Errors as `describe_topic`.

    Raises:
        ServiceError: also where no topic matches the pattern.
    """
    with _admin(bootstrap_servers, client) as admin:
        names: Iterable[str] = subscription.topics
        if subscription.pattern is not None:
            matches = re.compile(subscription.pattern).fullmatch
            names = sorted(
                one["name"] for one in admin.describe_topics() if not one["is_internal"] and matches(one["name"])
            )
            if not names:
                raise NotFoundError(f"no topic matches the pattern {subscription.pattern!r}: create one, or look at it")
        return [_described(admin, name, client, Right.READ) for name in names]


def describe_topic(
    bootstrap_servers: str, name: str, client: Mapping[str, Any] = OPEN, right: Right = Right.READ
) -> Topic:
    """The topic, made with the broker's defaults if it is not there.

    Args:
        client: kafka-python's arguments, as `kafka_security.client_arguments` makes them.
        right: what we are going to do with it.

    Raises:
        ServiceError: the broker does not answer, or does not let us; a RefusedError where that is not about the moment.
    """
    with _admin(bootstrap_servers, client) as admin:
        return _described(admin, name, client, right)


def _described(admin: Any, name: str, client: Mapping[str, Any], right: Right) -> Topic:
    _check_right(admin, name, right, client)
    described, begins, ends = _offsets_of(admin, name)
    return Topic(
        name,
        str(described["topic_id"]),
        {one.partition: found.offset for one, found in begins.items()},
        {one.partition: found.offset for one, found in ends.items()},
    )


def offsets_from(
    bootstrap_servers: str,
    topics: Iterable[Topic],
    when: "datetime | None",
    committed: bool,
    client: Mapping[str, Any] = OPEN,
) -> dict[tuple[str, int], int]:
    """(topic, partition) → the offset of the first message that is as new as a time, or else of the next to come.

    Args:
        when: by the messages' timestamps; None for the next message to come.
        committed: whether messages of open transactions are still to come.

    Raises:
        ServiceError: the broker does not answer.
    """
    from kafka import IsolationLevel, TopicPartition
    from kafka.admin import OffsetSpec
    from kafka.errors import KafkaError

    partitions = [TopicPartition(topic.name, one) for topic in topics for one in topic.begins]
    level = IsolationLevel.READ_COMMITTED if committed else IsolationLevel.READ_UNCOMMITTED
    try:
        with _admin(bootstrap_servers, client) as admin:
            found = admin.list_partition_offsets(dict.fromkeys(partitions, OffsetSpec.LATEST), isolation_level=level)
            offsets = {(one.topic, one.partition): found[one].offset for one in partitions}
            if when is not None:
                found = admin.list_partition_offsets(dict.fromkeys(partitions, int(when.timestamp() * 1000)))
                offsets |= {
                    (one.topic, one.partition): found[one].offset for one in partitions if found[one].offset >= 0
                }
    except KafkaError as error:
        raise UnavailableError(f"the offsets of the topics cannot be had: {error}") from error
    return offsets


def check_access(bootstrap_servers: str, name: str, client: Mapping[str, Any], right: Right) -> None:
    """Refuse to begin what the broker would not allow; the topic is made if it is not there.

    An open broker is only asked whether it is open. Args and errors as for `describe_topic`.
    """
    if not client:
        check_broker(bootstrap_servers, client)
        return
    with _admin(bootstrap_servers, client) as admin:
        _check_right(admin, name, right, client)


def _check_right(admin: Any, name: str, right: Right, client: Mapping[str, Any]) -> None:
    from kafka.admin import NewTopic
    from kafka.errors import AuthorizationError, KafkaError, TopicAlreadyExistsError

    try:
        found = admin.describe_topics([name])[0]
        if found["error_code"] == UNKNOWN_TOPIC:
            admin.create_topics([NewTopic(name, -1, -1, topic_configs=TOPIC_CONFIGURATION)])
            return
    except TopicAlreadyExistsError:
        return  # another process was quicker
    except AuthorizationError as error:
        raise RefusedError(f"topic {name!r} is not there, and {_who(client)} may not make it: make it first") from error
    except KafkaError as error:
        raise UnavailableError(f"topic {name!r} is not there and cannot be made: {error}") from error
    # A broker without ACLs allows everything, and an old one does not say.
    allowed = found.get("authorized_operations")
    if found["error_code"] == TOPIC_AUTHORIZATION_FAILED or (allowed and right not in {*allowed, "ALL"}):
        raise RefusedError(no_right(name, right, client))


def is_hidden(bootstrap_servers: str, name: str, client: Mapping[str, Any]) -> bool:
    """Whether the broker keeps the topic from us: for want of a right it looks as if it were not there."""
    with _admin(bootstrap_servers, client) as admin:
        return bool(admin.describe_topics([name])[0]["error_code"] == TOPIC_AUTHORIZATION_FAILED)


def no_right(name: str, right: Right, client: Mapping[str, Any]) -> str:
    """What to tell a user who may not do with a topic what he is about to do."""
    return (
        f"{_who(client)} has no right to {right.lower()} topic {name!r}: grant it with `kafka-acls.sh --add "
        f"--allow-principal User:NAME --operation {right.capitalize()} --topic {name}`, or look at "
        "IMAGESTREAM_KAFKA_USERNAME"
    )


def _who(client: Mapping[str, Any]) -> str:
    if user := client.get("sasl_plain_username"):
        return f"Kafka user {user!r}"
    return (
        "the owner of IMAGESTREAM_KAFKA_CERTIFICATE_FILE" if client.get("ssl_certfile") else "a client without a user"
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
                raise UnavailableError(f"the offsets of topic {name!r} cannot be had: {error}") from error
        else:
            if partitions:
                return described, begins, ends
        sleep(RETRY_S)


def topic_configuration(admin: Any, name: str) -> dict[str, str]:
    """The topic's settings by their names in Kafka, defaults included; empty without the right to see them."""
    from kafka.admin import ConfigResource, ConfigResourceType
    from kafka.errors import KafkaError

    try:
        found = admin.describe_configs([ConfigResource(ConfigResourceType.TOPIC, name)], config_filter="all")
    except KafkaError:
        return {}
    return {key: str(one["value"]) for key, one in found.get("topic", {}).get(name, {}).items()}


def topic_notices(bootstrap_servers: str, names: Iterable[str], client: Mapping[str, Any] = OPEN) -> list[str]:
    """What to tell about how topics are configured; nothing of those whose configuration we may not see.

    Raises:
        ServiceError: the broker does not answer.
    """
    with _admin(bootstrap_servers, client) as admin:
        return [
            f"topic {name!r} takes batches that unpack to any size: have its brokers refuse them with "
            f"`kafka-configs.sh --bootstrap-server {bootstrap_servers} --alter --entity-type topics "
            f"--entity-name {name} --add-config compression.type=uncompressed`"
            for name in names
            if topic_configuration(admin, name).get("compression.type", "uncompressed") != "uncompressed"
        ]


def messages_near_retention(
    bootstrap_servers: str,
    names: Sequence[str],
    committed: Mapping[tuple[str, int], int],
    client: Mapping[str, Any] = OPEN,
) -> dict[str, int]:
    """Topic → messages without a row of which more than half the time is over for which the topic keeps messages.

    Args:
        committed: (topic, partition) → one past the last message that has its row.

    Raises:
        ServiceError: the broker does not answer.
    """
    from kafka import TopicPartition
    from kafka.admin import OffsetSpec
    from kafka.errors import KafkaError

    found: dict[str, int] = {}
    try:
        with _admin(bootstrap_servers, client) as admin:
            for described in admin.describe_topics(list(names)):
                name = described["name"]
                configuration = topic_configuration(admin, name)
                kept_ms = int(configuration.get("retention.ms", -1))
                if kept_ms < 0 or "delete" not in configuration.get("cleanup.policy", ""):
                    continue
                half = int(time() * 1000) - kept_ms // 2
                places = {
                    TopicPartition(name, one): committed.get((name, one), 0)
                    for one in (part["partition_index"] for part in described["partitions"])
                }
                newer = admin.list_partition_offsets(dict.fromkeys(places, half))
                begins = admin.list_partition_offsets(dict.fromkeys(places, OffsetSpec.EARLIEST))
                ends = admin.list_partition_offsets(dict.fromkeys(places, OffsetSpec.LATEST))
                old = 0
                for place, end in places.items():
                    until = newer[place].offset if newer[place].offset >= 0 else ends[place].offset
                    old += max(0, until - max(end, begins[place].offset))
                if old:
                    found[name] = old
    except KafkaError as error:
        raise UnavailableError(f"the broker at {bootstrap_servers} does not answer: {error}") from error
    return found


def trouble_with_broker(bootstrap_servers: str, client: Mapping[str, Any] = OPEN) -> str | None:
    """Why no broker can be talked to just now; None where one answers within seconds."""
    try:
        with _admin(bootstrap_servers, client):
            return None
    except RefusedError as error:
        return str(error)
    except ServiceError:
        return f"the broker at {bootstrap_servers} does not answer"


@contextmanager
def _admin(bootstrap_servers: str, client: Mapping[str, Any]) -> Iterator[Any]:
    from kafka.admin import KafkaAdminClient
    from kafka.errors import KafkaError

    try:
        admin = connect(
            KafkaAdminClient,
            bootstrap_servers=bootstrap_servers,
            request_timeout_ms=TIMEOUT_MS,
            bootstrap_timeout_ms=TIMEOUT_MS,
            **client,
        )
    except (KafkaError, ValueError) as error:
        raise UnavailableError(
            f"no Kafka broker answers at {bootstrap_servers} ({error}); "
            "start the home's own with 'imagestream broker start', or check --bootstrap-servers"
        ) from error
    try:
        yield admin
    finally:
        admin.close()
