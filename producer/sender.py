"""Messages to one topic of Kafka, acknowledged by all its replicas; what waits for the broker is bounded.

kafka-python itself is imported late, since Spark workers import this package for the message contract only.
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

from producer.client import connect
from producer.errors import PublishError
from producer.message import HEADER_MARGIN_BYTES, MAX_MESSAGE_BYTES, TOPIC_CONFIGURATION, Delivery, Message

if TYPE_CHECKING:
    from kafka import KafkaProducer
    from kafka.admin import KafkaAdminClient

CONNECT_TIMEOUT_S = 10.0
DELIVERY_TIMEOUT_S = 30.0  # for a message, with every retry; and the longest silence of a broker
IN_FLIGHT_BYTES = 64 * 1024 * 1024  # kafka-python 3 has no bound of its own on what waits to be sent
IN_FLIGHT_MESSAGES = 20_000
BATCH_BYTES = 512 * 1024  # some twenty images of 24 KB, and below the smallest usual limit of a broker, 1 MB
LINGER_MS = 10
REMAKE_S = 2.0  # where no broker answers, for so long none is asked again
OPEN: Mapping[str, Any] = MappingProxyType({})  # the arguments of a client that talks to an open broker


@dataclass(eq=False, slots=True)
class _Promise:
    """A message under way: its bytes, what becomes of it, and since when."""

    bytes: int
    delivery: "Future[Delivery]" = field(default_factory=Future)
    since: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.delivery.set_running_or_notify_cancel()  # from now on nobody can cancel it


class Sender:
    """Sends messages to a topic; may be used by several threads.

    Attributes:
        topic: made with the brokers' defaults if it was not there.
        max_message_bytes: the largest message that the topic takes, headers included; see `message_bytes`.
    """

    def __init__(
        self,
        bootstrap_servers: str,
        topic: str,
        *,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
        delivery_timeout_s: float | None = None,
        client: Mapping[str, Any] = OPEN,
    ) -> None:
        """Connect, and make the topic if it is not there.

        Args:
            client: kafka-python's arguments for protocol, user and certificates.

        Raises:
            PublishError: the broker does not answer, or the topic cannot be used.
        """
        self.topic = topic
        self._servers = bootstrap_servers
        self._client = client
        self._connect_timeout_s = connect_timeout_s
        self._patience_s = DELIVERY_TIMEOUT_S if delivery_timeout_s is None else delivery_timeout_s
        self._numbers = count()
        self._under_way: dict[int, _Promise] = {}  # by number, the oldest first
        self._in_flight_bytes = 0
        self._changed = threading.Condition()
        self._making = threading.Lock()
        self._suspect: KafkaProducer | None = None  # it failed to deliver a message
        self._make_again = 0.0
        admin = _admin(bootstrap_servers, connect_timeout_s, client)
        try:
            self.max_message_bytes = _topic_limit(admin, bootstrap_servers, topic)
        finally:
            admin.close()
        self._producer = self._make_producer()

    def send(self, message: Message) -> "Future[Delivery]":
        """Hand a message over once there is room for it; one larger than the bound goes alone.

        Returns:
            Where the broker put it, once all replicas have it; or else a PublishError that says why it was not
            acknowledged. A message whose acknowledgement was lost may be in the topic all the same.
        """
        from kafka.errors import KafkaError

        promise = _Promise(len(message.value))
        with self._changed:
            self._wait_until(lambda: self._has_room(promise.bytes))
            number = next(self._numbers)
            self._under_way[number] = promise
            self._in_flight_bytes += promise.bytes
        try:
            producer = self._usable_producer()
            sending = producer.send(self.topic, message.value, message.key, message.headers)
        except (KafkaError, PublishError) as error:
            self._on_failed(number, None, error)
        else:
            sending.add_callback(partial(self._on_sent, number))
            sending.add_errback(partial(self._on_failed, number, producer))
        return promise.delivery

    def finish(self) -> None:
        """Wait for the answers to everything that is under way."""
        with self._changed:
            self._wait_until(lambda: not self._under_way)

    def close(self) -> None:
        """Give up what is under way, and disconnect."""
        _close(self._producer)

    def answers(self, timeout_s: float = 3.0) -> bool:
        """Whether the broker tells of the topic when it is asked now."""
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
        room = self._in_flight_bytes + size <= IN_FLIGHT_BYTES and len(self._under_way) < IN_FLIGHT_MESSAGES
        return room or not self._under_way

    def _wait_until(self, condition: Callable[[], bool]) -> None:
        # Not `flush()`, which in kafka-python 3.0.12 does not come back while a broker holds its connections open
        # without answering.
        while not condition():
            if not self._changed.wait(self._patience_s):  # not one answer in all that time
                for number in list(self._under_way):
                    self._settle(number, PublishError(f"the broker gave no answer for {self._patience_s:g} s"))

    def _settle(self, number: int, outcome: Delivery | PublishError) -> None:
        # An answer may come after we have given up on it: what was told about that message stands.
        if number not in self._under_way:
            return
        promise = self._under_way.pop(number)
        self._in_flight_bytes -= promise.bytes
        if isinstance(outcome, Delivery):
            promise.delivery.set_result(outcome)
        else:
            promise.delivery.set_exception(outcome)
        self._changed.notify_all()

    # The callbacks run on the producer's own thread.

    def _on_sent(self, number: int, metadata: Any) -> None:
        with self._changed:
            self._settle(number, Delivery(metadata.topic, metadata.partition, metadata.offset))

    def _on_failed(self, number: int, producer: "KafkaProducer | None", error: BaseException) -> None:
        with self._changed:
            self._suspect = producer or self._suspect
            self._settle(number, PublishError(str(error) or type(error).__name__))

    def _usable_producer(self) -> "KafkaProducer":
        """The producer, or a new one after a failure.

        An idempotent producer of kafka-python 3.0.12 may send nothing any more, and not say so, after one message was
        not acknowledged in time; and it refuses everything after an error that it takes for fatal.
        """
        with self._making:
            if self._suspect is self._producer or self._is_stuck():
                if time.monotonic() < self._make_again:
                    raise PublishError(f"no Kafka broker answers at {self._servers!r}")
                suspect = self._producer
                try:
                    self._producer = self._make_producer()
                except PublishError:
                    self._make_again = time.monotonic() + REMAKE_S
                    raise
                _close(suspect)
            return self._producer

    def _is_stuck(self) -> bool:
        with self._changed:
            oldest = next(iter(self._under_way.values()))
            return time.monotonic() - oldest.since > 2 * self._patience_s

    def _make_producer(self) -> "KafkaProducer":
        from kafka import KafkaProducer
        from kafka.errors import KafkaError
        from kafka.record import util as record_util

        if record_util.crc32c_c is None:  # the checksum in Python alone makes publishing twenty times slower
            raise PublishError("kafka-python does not find the package crc32c: install it")
        try:
            made: KafkaProducer = connect(
                KafkaProducer,
                bootstrap_servers=self._servers,
                client_id="imagestream-publish",
                acks="all",
                enable_idempotence=True,
                max_request_size=self.max_message_bytes,
                batch_size=min(BATCH_BYTES, self.max_message_bytes),  # a topic's limit holds for a batch, too
                linger_ms=LINGER_MS,
                compression_type=None,  # an encoded image does not shrink any further
                bootstrap_timeout_ms=int(self._connect_timeout_s * 1000),
                max_block_ms=int(self._connect_timeout_s * 1000),
                request_timeout_ms=int(self._patience_s * 1000 / 2),
                delivery_timeout_ms=int(self._patience_s * 1000),
                **self._client,
            )
        except (KafkaError, ValueError) as error:
            raise PublishError(f"no Kafka broker answers at {self._servers!r}: {error}") from error
        return made


def message_bytes(message: Message) -> int:
    """The bytes of a message in a batch of its own, as kafka-python and the broker count them."""
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
            f"no Kafka broker answered at {bootstrap_servers!r} within {timeout_s:g} s: start the home's own "
            "with `imagestream broker start`, or name another with --bootstrap-servers"
        ) from error
    return admin


def _topic_limit(admin: "KafkaAdminClient", bootstrap_servers: str, topic: str) -> int:
    """The largest message in bytes, headers included, that `topic` takes; the topic is made if it is not there."""
    from kafka.admin import ConfigResource, ConfigResourceType, NewTopic
    from kafka.errors import AuthorizationError, KafkaError, TopicAlreadyExistsError

    unknown = MAX_MESSAGE_BYTES + HEADER_MARGIN_BYTES
    try:
        if topic not in admin.list_topics():
            with suppress(TopicAlreadyExistsError):  # another process was quicker
                admin.create_topics([NewTopic(topic, -1, -1, topic_configs=TOPIC_CONFIGURATION)])
        asked = ConfigResource(ConfigResourceType.TOPIC, topic, ["max.message.bytes"])
        try:
            answer: dict[str, Any] = admin.describe_configs([asked], config_filter="all")
        except AuthorizationError:  # to write takes no right to read the configuration
            return unknown
        return int(answer["topic"][topic]["max.message.bytes"]["value"])
    except (KeyError, TypeError):  # a broker may keep its configuration to itself
        return unknown
    except (KafkaError, ValueError) as error:
        raise PublishError(f"topic {topic!r} at {bootstrap_servers!r} cannot be written to: {error}") from error


def _close(producer: "KafkaProducer") -> None:
    from kafka.errors import KafkaTimeoutError

    try:
        producer.close(timeout=1)
    except KafkaTimeoutError:  # it closes only when nothing is under way: give up what a silent broker left there
        producer._sender.force_close()
        producer.close(timeout=1)
