"""Topics in Kafka: their identity, offsets, configuration and permissions."""

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
OPEN: Mapping[str, Any] = MappingProxyType({})  # the security arguments of a client for a plaintext listener
TOPIC_AUTHORIZATION_FAILED = 29  # Kafka's error codes
UNKNOWN_TOPIC = 3


class TopicOperation(StrEnum):
    """An operation on a topic in Kafka's ACLs; each implies `Describe`."""

    READ = "READ"
    WRITE = "WRITE"


@dataclass(frozen=True)
class Topic:
    """The current state of a topic.

    Attributes:
        name: in Kafka.
        id: assigned when the topic was created; a topic that is recreated under the same name has another id.
        begins: partition → the start of its log.
        ends: partition → one past its last offset.
    """

    name: str
    id: str
    begins: dict[int, int]
    ends: dict[int, int]


@dataclass(frozen=True)
class Subscription:
    """The topics that a stream reads, by name or by a pattern.

    Attributes:
        topics: names in Kafka.
        pattern: a regular expression that must match the whole name, in Java as well as in Python.
    """

    topics: tuple[str, ...] = ()
    pattern: str | None = None

    def __str__(self) -> str:
        return ",".join(self.topics) if self.pattern is None else f"pattern {self.pattern}"

    def includes(self, name: str) -> bool:
        """Whether the subscription includes a topic."""
        return name in self.topics if self.pattern is None else re.fullmatch(self.pattern, name) is not None

    @property
    def spark_option(self) -> tuple[str, str]:
        """The name and value of the option of Spark's Kafka source."""
        return ("subscribe", ",".join(self.topics)) if self.pattern is None else ("subscribePattern", self.pattern)


def describe_topics(
    bootstrap_servers: str, subscription: Subscription, client: Mapping[str, Any] = OPEN
) -> list[Topic]:
    """The topics of a subscription; named topics are created if they do not exist.

    Args:
        client: security arguments from `kafka_security.client_arguments`.

    Raises:
        ServiceError: no topic matches the pattern; or see `describe_topic`.
    """
    with _admin(bootstrap_servers, client) as admin:
        names: Iterable[str] = subscription.topics
        if subscription.pattern is not None:
            matches = re.compile(subscription.pattern).fullmatch
            names = sorted(
                one["name"] for one in admin.describe_topics() if not one["is_internal"] and matches(one["name"])
            )
            if not names:
                raise NotFoundError(
                    f"no topic matches the pattern {subscription.pattern!r}: create one, or correct the pattern"
                )
        return [_described(admin, name, client, TopicOperation.READ) for name in names]


def describe_topic(
    bootstrap_servers: str, name: str, client: Mapping[str, Any] = OPEN, right: TopicOperation = TopicOperation.READ
) -> Topic:
    """A topic, created with the broker's defaults if it does not exist.

    Args:
        client: security arguments from `kafka_security.client_arguments`.

    Raises:
        ServiceError: the broker does not answer.
        RefusedError: the broker denies access.
    """
    with _admin(bootstrap_servers, client) as admin:
        return _described(admin, name, client, right)


def _described(admin: Any, name: str, client: Mapping[str, Any], right: TopicOperation) -> Topic:
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
    """(topic, partition) → the offset of the first message at or after a time, or of the next message if there is none.

    Args:
        topics: whose partitions are looked up.
        when: compared with the messages' timestamps; None for the next message.
        committed: whether messages of open transactions count as not published yet.
        client: security arguments from `kafka_security.client_arguments`.

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
        raise UnavailableError(f"the offsets of the topics cannot be read: {error}") from error
    return offsets


def check_access(bootstrap_servers: str, name: str, client: Mapping[str, Any], right: TopicOperation) -> None:
    """Check the permission for a topic, and create the topic if it does not exist.

    Without security arguments, only the connection is checked. For arguments and errors, see `describe_topic`.
    """
    if not client:
        check_broker(bootstrap_servers, client)
        return
    with _admin(bootstrap_servers, client) as admin:
        _check_right(admin, name, right, client)


def _check_right(admin: Any, name: str, right: TopicOperation, client: Mapping[str, Any]) -> None:
    from kafka.admin import NewTopic
    from kafka.errors import AuthorizationError, KafkaError, TopicAlreadyExistsError

    try:
        found = admin.describe_topics([name])[0]
        if found["error_code"] == UNKNOWN_TOPIC:
            admin.create_topics([NewTopic(name, -1, -1, topic_configs=TOPIC_CONFIGURATION)])
            return
    except TopicAlreadyExistsError:
        return  # another process has created it
    except AuthorizationError as error:
        raise RefusedError(
            f"topic {name!r} does not exist, and {_user(client)} may not create it: create it first"
        ) from error
    except KafkaError as error:
        raise UnavailableError(f"topic {name!r} does not exist and cannot be created: {error}") from error
    # A broker without ACLs allows everything, and an old broker does not report permissions.
    allowed = found.get("authorized_operations")
    if found["error_code"] == TOPIC_AUTHORIZATION_FAILED or (allowed and right not in {*allowed, "ALL"}):
        raise RefusedError(permission_error(name, right, client))


def is_hidden(bootstrap_servers: str, name: str, client: Mapping[str, Any]) -> bool:
    """Whether the broker hides the topic, since the client has no permission to describe it."""
    with _admin(bootstrap_servers, client) as admin:
        return bool(admin.describe_topics([name])[0]["error_code"] == TOPIC_AUTHORIZATION_FAILED)


def permission_error(name: str, right: TopicOperation, client: Mapping[str, Any]) -> str:
    """The error for a missing permission."""
    return (
        f"{_user(client)} is not authorized to {right.lower()} topic {name!r}: grant it with `kafka-acls.sh --add "
        f"--allow-principal User:NAME --operation {right.capitalize()} --topic {name}`, or check "
        "IMAGESTREAM_KAFKA_USERNAME"
    )


def _user(client: Mapping[str, Any]) -> str:
    if user := client.get("sasl_plain_username"):
        return f"Kafka user {user!r}"
    return (
        "the owner of IMAGESTREAM_KAFKA_CERTIFICATE_FILE" if client.get("ssl_certfile") else "a client without a user"
    )


def _offsets_of(admin: Any, name: str) -> tuple[Any, Any, Any]:
    """The description, first and end offsets of a topic; waits until the partitions of a new topic have leaders."""
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
                raise UnavailableError(f"the offsets of topic {name!r} cannot be read: {error}") from error
        else:
            if partitions:
                return described, begins, ends
        sleep(RETRY_S)


def topic_configuration(admin: Any, name: str) -> dict[str, str]:
    """The topic's configuration, including defaults; empty without the permission to see it."""
    from kafka.admin import ConfigResource, ConfigResourceType
    from kafka.errors import KafkaError

    try:
        found = admin.describe_configs([ConfigResource(ConfigResourceType.TOPIC, name)], config_filter="all")
    except KafkaError:
        return {}
    return {key: str(one["value"]) for key, one in found.get("topic", {}).get(name, {}).items()}


def topic_notices(bootstrap_servers: str, names: Iterable[str], client: Mapping[str, Any] = OPEN) -> list[str]:
    """Warnings about the configuration of topics, if it can be read.

    Raises:
        ServiceError: the broker does not answer.
    """
    with _admin(bootstrap_servers, client) as admin:
        return [
            f"topic {name!r} accepts batches of any decompressed size: make its brokers reject large ones with "
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
    """Topic → the number of messages without a row that are older than half of the topic's retention time.

    Args:
        names: of topics in Kafka.
        committed: (topic, partition) → one past the last message with a row.
        client: security arguments from `kafka_security.client_arguments`.

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


def broker_problem(bootstrap_servers: str, client: Mapping[str, Any] = OPEN) -> str | None:
    """Why no broker is available at the moment; None if one answers within seconds."""
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
            f"no Kafka broker answers at {bootstrap_servers} ({error}): start the home's broker with "
            "'imagestream broker start', or check --bootstrap-servers"
        ) from error
    try:
        yield admin
    finally:
        admin.close()
