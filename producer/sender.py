"""Sending messages to one Kafka topic, acknowledged by all replicas, with a bound on messages in flight.

kafka-python is imported late because Spark workers import this package for the message contract only.
"""

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from producer.client import close_producer, connect
from producer.errors import PublishError
from producer.message import HEADER_MARGIN_BYTES, MAX_MESSAGE_BYTES, TOPIC_CONFIGURATION, Delivery, Message

if TYPE_CHECKING:
    from kafka import KafkaProducer
    from kafka.admin import KafkaAdminClient

CONNECT_TIMEOUT_S = 10.0
DELIVERY_TIMEOUT_S = 30.0  # for a message with all its retries, and for any answer from the broker
IN_FLIGHT_BYTES = 64 * 1024 * 1024  # kafka-python 3 does not bound its send buffer
IN_FLIGHT_MESSAGES = 20_000
BATCH_BYTES = 512 * 1024  # about twenty images of 24 KB, and below the usual broker limit of 1 MB
LINGER_MS = 10
RECONNECT_BACKOFF_S = 2.0
PLAINTEXT: Mapping[str, Any] = MappingProxyType({})  # a client without security arguments


@dataclass(eq=False, slots=True)
class _InFlight:
    """A message in flight: its size, its future delivery and when it was sent."""

    bytes: int
    delivery: "Future[Delivery]" = field(default_factory=Future)
    since: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.delivery.set_running_or_notify_cancel()  # a message that was handed over cannot be cancelled


class Sender:
    """Sends messages to a topic; thread-safe.

    Attributes:
        max_message_bytes: the largest message that the topic accepts, headers included; see `message_bytes`.
    """

    def __init__(
        self,
        bootstrap_servers: str,
        topic: str,
        *,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
        delivery_timeout_s: float | None = None,
        client: Mapping[str, Any] = PLAINTEXT,
    ) -> None:
        """Connect, and create the topic with the broker's defaults if it does not exist.

        Args:
            bootstrap_servers: addresses of the brokers, `host:port,…`.
            connect_timeout_s: the time to wait for a broker, in seconds.
            delivery_timeout_s: the time to wait for an acknowledgement, in seconds; default: 30.
            client: kafka-python's security arguments.

        Raises:
            PublishError: the broker does not answer, or the topic cannot be used.
        """
        self.topic = topic
        self._servers = bootstrap_servers
        self._client = client
        self._connect_timeout_s = connect_timeout_s
        self._delivery_timeout_s = DELIVERY_TIMEOUT_S if delivery_timeout_s is None else delivery_timeout_s
        self._numbers = count()
        self._in_flight: dict[int, _InFlight] = {}  # by number, the oldest first
        self._in_flight_bytes = 0
        self._changed = threading.Condition()
        self._connecting = threading.Lock()
        self._suspect: KafkaProducer | None = None  # it failed to deliver a message
        self._retry_at = 0.0
        admin = _admin(bootstrap_servers, connect_timeout_s, client)
        try:
            self.max_message_bytes = _topic_limit(admin, bootstrap_servers, topic)
        finally:
            admin.close()
        self._producer = self._connect_producer()

    def send(self, message: Message) -> "Future[Delivery]":
        """Send a message, blocking until there is room; one larger than the bound is sent alone.

        Returns:
            The message's position once all replicas have it, or a PublishError with the reason why it was not
            acknowledged. A message whose acknowledgement was lost may be in the topic nevertheless.
        """
        from kafka.errors import KafkaError

        sent = _InFlight(len(message.value))
        with self._changed:
            self._wait_until(lambda: self._has_room(sent.bytes))
            number = next(self._numbers)
            self._in_flight[number] = sent
            self._in_flight_bytes += sent.bytes
        try:
            producer = self._usable_producer()
            sending = producer.send(self.topic, message.value, message.key, message.headers)
        except (KafkaError, PublishError) as error:
            self._on_failed(number, None, error)
        else:
            sending.add_callback(partial(self._on_sent, number))
            sending.add_errback(partial(self._on_failed, number, producer))
        return sent.delivery

    def finish(self) -> None:
        """Wait until no message is in flight."""
        with self._changed:
            self._wait_until(lambda: not self._in_flight)

    def close(self) -> None:
        """Disconnect, dropping the messages in flight."""
        close_producer(self._producer)

    def answers(self, timeout_s: float = 3.0) -> bool:
        """Whether the broker answers now, and has the topic."""
        from kafka.errors import KafkaError

        try:
            admin = _admin(self._servers, timeout_s, self._client)
        except PublishError:
            return False
        try:
            return self.topic in admin.list_topics()
        except KafkaError:
            return False
        finally:
            admin.close()

    def _has_room(self, size: int) -> bool:
        room = self._in_flight_bytes + size <= IN_FLIGHT_BYTES and len(self._in_flight) < IN_FLIGHT_MESSAGES
        return room or not self._in_flight

    def _wait_until(self, condition: Callable[[], bool]) -> None:
        # Not `flush()`, which in kafka-python 3.0.12 hangs while a broker keeps its connections open but is silent.
        timeout_s = self._delivery_timeout_s
        while not condition():
            if not self._changed.wait(timeout_s):  # no message was acknowledged or failed in that time
                for number in list(self._in_flight):
                    self._complete(number, PublishError(f"the broker did not answer within {timeout_s:g} s"))

    def _complete(self, number: int, outcome: Delivery | PublishError) -> None:
        if number not in self._in_flight:  # the answer came after the timeout, which was reported
            return
        sent = self._in_flight.pop(number)
        self._in_flight_bytes -= sent.bytes
        if isinstance(outcome, Delivery):
            sent.delivery.set_result(outcome)
        else:
            sent.delivery.set_exception(outcome)
        self._changed.notify_all()

    # The callbacks run on the producer's own thread.

    def _on_sent(self, number: int, metadata: Any) -> None:
        with self._changed:
            self._complete(number, Delivery(metadata.topic, metadata.partition, metadata.offset))

    def _on_failed(self, number: int, producer: "KafkaProducer | None", error: BaseException) -> None:
        with self._changed:
            self._suspect = producer or self._suspect
            self._complete(number, PublishError(str(error) or type(error).__name__))

    def _usable_producer(self) -> "KafkaProducer":
        """The producer, replaced after a failure.

        After one message that was not acknowledged in time, an idempotent producer of kafka-python 3.0.12 may silently
        stop sending; and it rejects every message after an error that it considers fatal.
        """
        with self._connecting:
            if self._suspect is self._producer or self._is_stuck():
                if time.monotonic() < self._retry_at:
                    raise PublishError(f"no Kafka broker answers at {self._servers!r}")
                suspect = self._producer
                try:
                    self._producer = self._connect_producer()
                except PublishError:
                    self._retry_at = time.monotonic() + RECONNECT_BACKOFF_S
                    raise
                close_producer(suspect)
            return self._producer

    def _is_stuck(self) -> bool:
        with self._changed:
            oldest = next(iter(self._in_flight.values()))
            return time.monotonic() - oldest.since > 2 * self._delivery_timeout_s

    def _connect_producer(self) -> "KafkaProducer":
        from kafka import KafkaProducer
        from kafka.errors import KafkaError
        from kafka.record import util as record_util

        if record_util.crc32c_c is None:  # checksums in pure Python make publishing twenty times slower
            raise PublishError("kafka-python cannot find the package crc32c: install it")
        try:
            connected: KafkaProducer = connect(
                KafkaProducer,
                bootstrap_servers=self._servers,
                client_id="imagestream-publish",
                acks="all",
                enable_idempotence=True,
                max_request_size=self.max_message_bytes,
                batch_size=min(BATCH_BYTES, self.max_message_bytes),  # the topic's limit also applies to batches
                linger_ms=LINGER_MS,
                compression_type=None,  # images are compressed already
                bootstrap_timeout_ms=int(self._connect_timeout_s * 1000),
                max_block_ms=int(self._connect_timeout_s * 1000),
                request_timeout_ms=int(self._delivery_timeout_s * 1000 / 2),
                delivery_timeout_ms=int(self._delivery_timeout_s * 1000),
                **self._client,
            )
        except (KafkaError, ValueError) as error:
            raise PublishError(f"no Kafka broker answers at {self._servers!r}: {error}") from error
        return connected


def message_bytes(message: Message) -> int:
    """The size in bytes of a batch with a single message, as kafka-python and the broker count it."""
    from kafka.record.default_records import DefaultRecordBatchBuilder

    return int(DefaultRecordBatchBuilder.estimate_size_in_bytes(message.key, message.value, message.headers))


def _admin(bootstrap_servers: str, timeout_s: float, client: Mapping[str, Any]) -> "KafkaAdminClient":
    from kafka.admin import KafkaAdminClient
    from kafka.errors import KafkaError

    try:
        admin: KafkaAdminClient = connect(
            KafkaAdminClient, bootstrap_servers=bootstrap_servers, bootstrap_timeout_ms=int(timeout_s * 1000), **client
        )
    except (KafkaError, ValueError) as error:
        raise PublishError(
            f"no Kafka broker answered at {bootstrap_servers!r} within {timeout_s:g} s: start the local one "
            "with `imagestream broker start`, or set another with --bootstrap-servers"
        ) from error
    return admin


def _topic_limit(admin: "KafkaAdminClient", bootstrap_servers: str, topic: str) -> int:
    """The largest message that `topic` accepts, in bytes with headers; creates the topic if it does not exist."""
    from kafka.admin import ConfigResource, ConfigResourceType, NewTopic
    from kafka.errors import AuthorizationError, KafkaError, TopicAlreadyExistsError

    unknown = MAX_MESSAGE_BYTES + HEADER_MARGIN_BYTES
    try:
        if topic not in admin.list_topics():
            with suppress(TopicAlreadyExistsError):  # created by another process meanwhile
                admin.create_topics([NewTopic(topic, -1, -1, topic_configs=TOPIC_CONFIGURATION)])
        asked = ConfigResource(ConfigResourceType.TOPIC, topic, ["max.message.bytes"])
        try:
            answer: dict[str, Any] = admin.describe_configs([asked], config_filter="all")
        except AuthorizationError:  # permission to write does not include reading the configuration
            return unknown
        return int(answer["topic"][topic]["max.message.bytes"]["value"])
    except (KeyError, TypeError):  # a broker may withhold its configuration
        return unknown
    except (KafkaError, ValueError) as error:
        raise PublishError(f"topic {topic!r} at {bootstrap_servers!r} cannot be written to: {error}") from error
