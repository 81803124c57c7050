"""Reading the answers topic: its brokers, its committed messages, and whether a stream can send to it."""

from collections.abc import Iterator, Mapping
from contextlib import closing
from time import monotonic
from typing import Any

from producer.message import HEADER_TYPE
from streaming.errors import ConfigurationError, ServiceError, UnavailableError
from streaming.pipeline.answer_avro import has_schema_id
from streaming.pipeline.answer_message import HEADER_SCHEMA, SCHEMA_IDS, TYPES
from streaming.platform.broker import bootstrap_servers as home_servers
from streaming.platform.kafka_client import connect
from streaming.platform.kafka_security import client_arguments
from streaming.platform.topic import Topic
from streaming.platform.transactional_producer import CONNECT_TIMEOUT_S
from streaming.settings import Settings

ANSWER_TIMEOUT_S = 15.0  # for one request, including its retries
SCAN_TIMEOUT_S = 60.0
LAST_MESSAGES = 10  # of each partition, which are checked before a stream starts


class AnswersAwayError(UnavailableError):
    """The broker of the answers topic does not respond, so that a batch is not complete yet; a retry may succeed."""


def answers_servers(settings: Settings) -> str:
    """The brokers of the answers topic: those set for it, or else those of the images.

    Raises:
        AnswersAwayError: none are set, and the home's broker is not running.
    """
    if settings.answers_bootstrap_servers:
        return settings.answers_bootstrap_servers
    try:
        return home_servers(settings)
    except ServiceError as error:
        raise AnswersAwayError(f"answers topic: {error}") from error


def transactional_id_of(stream: str) -> str:
    """The transactional id of a stream, by its id; also the group whose offset is the newest committed batch."""
    return f"imagestream-{stream}"


def committed_batch(servers: str, stream: str, topic: str, client: Mapping[str, Any]) -> int | None:
    """Number of the newest batch of a stream whose answers are committed; None if the broker has no offset.

    Raises:
        kafka.errors.KafkaError, ServiceError: the broker does not respond or denies access.
    """
    from kafka import TopicPartition

    with closing(open_consumer(servers, client, transactional_id_of(stream))) as consumer:
        offset: int | None = consumer.committed(TopicPartition(topic, 0), timeout_ms=int(ANSWER_TIMEOUT_S * 1000))
    return offset


def open_consumer(
    servers: str, client: Mapping[str, Any], group: str | None = None, isolation: str = "read_committed"
) -> Any:
    """A consumer of committed messages, by default, for which a deleted offset is an error."""
    from kafka import KafkaConsumer

    return connect(
        KafkaConsumer,
        bootstrap_servers=servers,
        group_id=group,
        isolation_level=isolation,  # also for the group's offset: waits for a pending commit
        enable_auto_commit=False,
        auto_offset_reset="none",
        bootstrap_timeout_ms=int(CONNECT_TIMEOUT_S * 1000),
        **client,
    )


def records_until(consumer: Any, ends: Mapping[Any, int]) -> Iterator[Any]:
    """The records from the consumer's positions to the end of each of its partitions.

    Raises:
        AnswersAwayError: the ends are not reached in time.
    """
    give_up, left = monotonic() + SCAN_TIMEOUT_S, dict(ends)
    while left := {one: end for one, end in left.items() if consumer.position(one) < end}:
        if monotonic() > give_up:
            raise AnswersAwayError(
                f"answers topic {min(left).topic!r} cannot be read to its end within {SCAN_TIMEOUT_S:g} s: another "
                "program may have an open transaction on it"
            )
        for records in consumer.poll(timeout_ms=500).values():
            yield from records


def check_messages(settings: Settings, topic: Topic) -> None:
    """Reject a topic whose last messages are not answers in the configured format.

    Raises:
        ServiceError: it has other messages; an AnswersAwayError if it cannot be read.
    """
    from kafka import TopicPartition
    from kafka.errors import KafkaError

    ends = {TopicPartition(topic.name, one): end for one, end in topic.ends.items() if end > topic.begins[one]}
    if not ends:
        return
    client = client_arguments(settings)
    try:
        with closing(open_consumer(answers_servers(settings), client, isolation="read_uncommitted")) as consumer:
            consumer.assign(list(ends))
            for place, end in ends.items():
                consumer.seek(place, max(topic.begins[place.partition], end - LAST_MESSAGES))
            for record in records_until(consumer, ends):
                _check_message(settings, topic.name, record)
    except KafkaError as error:
        raise AnswersAwayError(f"answers topic {topic.name!r} cannot be read: {error}") from error


def _check_message(settings: Settings, topic: str, record: Any) -> None:
    """Reject a message that the stream would not send with its settings."""
    headers, format_ = dict(record.headers), settings.answers_format
    schema, expected = (headers.get(HEADER_SCHEMA) or b"").decode(errors="replace")[:100], SCHEMA_IDS[format_]
    what, fix, registered = None, "choose another topic", has_schema_id(record.value or b"")
    if headers.get(HEADER_TYPE) not in {name.encode() for name in TYPES.values()}:
        what = "a message that is not an answer"
    elif schema != expected:
        what = f"answers of schema {schema!r}, expected {expected!r}"
        fix += "".join(f" or set --answers-format {name}" for name, one in SCHEMA_IDS.items() if one == schema)
    elif format_ == "avro" and registered != (settings.schema_registry is not None):
        what = f"Avro records {'with' if registered else 'without'} the id of a schema registry"
        fix += f" or {'set' if registered else 'do not set'} --schema-registry"
    if what:
        place = f"offset {record.offset} of partition {record.partition}"
        raise ConfigurationError(f"--answers-topic: {topic!r} has {what} ({place}): {fix}")
