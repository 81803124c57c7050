"""Sending files to Kafka: each file becomes one acknowledged message, or a name and a reason why not.

A file is read only when there is room for it: at most IN_FLIGHT_BYTES wait for the broker at any time, and what the
broker answers is counted in callbacks, so memory does not grow with the number of files. kafka-python itself is
imported late, since Spark workers import this package for the message contract only.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any

from producer.errors import PublishError
from producer.message import (
    DEFAULT_TOPIC,
    HEADER_MARGIN_BYTES,
    MAX_MESSAGE_BYTES,
    SNIFF_BYTES,
    UNKNOWN_CONTENT,
    Message,
    build_message,
    content_type,
)
from producer.sources import LabelFrom, SourceFile, find_files

if TYPE_CHECKING:
    from kafka import KafkaProducer

CONNECT_TIMEOUT_S = 10.0
DELIVERY_TIMEOUT_S = 30.0  # for a message, with every retry; and the longest silence of a broker
IN_FLIGHT_BYTES = 64 * 1024 * 1024  # kafka-python 3 has no bound of its own on what waits to be sent
BATCH_BYTES = 512 * 1024  # some twenty images of 24 KB, and below the smallest usual limit of a broker, 1 MB
LINGER_MS = 10


class Reason(StrEnum):
    """Why a file was not sent."""

    TOO_LARGE = "too large"
    UNREADABLE = "unreadable"
    NOT_AN_IMAGE = "not an image"


@dataclass(frozen=True, slots=True)
class Skipped:
    """A file that was left out before it was sent; `wanted` where an option asked for leaving it out."""

    path: str
    reason: Reason
    detail: str
    wanted: bool = False


@dataclass(frozen=True, slots=True)
class Failed:
    """A file that was sent, but whose delivery the broker did not acknowledge."""

    path: str
    reason: str


@dataclass(frozen=True, slots=True)
class Progress:
    """How far publishing is: files dealt with and files in all, messages acknowledged and their bytes."""

    done: int
    total: int
    sent: int
    bytes: int


@dataclass(frozen=True, slots=True)
class PublishSummary:
    """What became of the files: sent + skipped + failed = found, unless a failure or Ctrl-C stopped it before the end.

    Attributes:
        found: files that the paths named.
        sent: messages that the broker acknowledged, and the `bytes` of their images.
        seconds: from the first file to the last acknowledgement.
    """

    topic: str
    found: int
    sent: int
    bytes: int
    seconds: float
    skipped: list[Skipped]
    failed: list[Failed]
    interrupted: bool = False

    @property
    def complete(self) -> bool:
        """Whether every file was sent, but for those that an option asked to leave out."""
        wanted = sum(skip.wanted for skip in self.skipped)
        return not self.failed and not self.interrupted and self.sent + wanted == self.found

    @property
    def images_per_second(self) -> float:
        return self.sent / self.seconds if self.seconds else 0.0

    @property
    def megabytes_per_second(self) -> float:
        return self.bytes / 1e6 / self.seconds if self.seconds else 0.0


def publish(
    paths: Iterable[str | os.PathLike[str]],
    *,
    bootstrap_servers: str,
    topic: str = DEFAULT_TOPIC,
    label_from: LabelFrom | str = LabelFrom.NONE,
    only_images: bool = False,
    skip_too_large: bool = False,
    max_bytes: int = MAX_MESSAGE_BYTES,
    on_progress: Callable[[Progress], None] | None = None,
    connect_timeout_s: float = CONNECT_TIMEOUT_S,
) -> PublishSummary:
    """Send every regular file that `paths` name to `topic`, each as one message, acknowledged by all replicas.

    Args:
        paths: files, folders and patterns, as `producer.sources.find_files` takes them.
        bootstrap_servers: `host:port,…` of the brokers.
        topic: made with the brokers' defaults if it is not there.
        label_from: `parent` sends the name of the folder that a file lies in as its label.
        only_images: leave out what is no image by its first bytes.
        skip_too_large: count a file that is too large as left out on purpose.
        max_bytes: the largest file to send; where the topic takes less, its limit counts.
        on_progress: called after every file.
        connect_timeout_s: how long to wait for a broker to answer.

    Returns:
        The summary. A failed delivery and Ctrl-C stop the sending, wait for what is under way, and are told there.

    Raises:
        PublishError: a path, the topic or the broker cannot be used; nothing was sent then.
    """
    sources = find_files(paths, label_from)
    message_limit = _topic_limit(bootstrap_servers, topic, connect_timeout_s)
    producer = _producer(bootstrap_servers, message_limit, connect_timeout_s)
    skipped = [Skipped(name, Reason.UNREADABLE, reason) for name, reason in sources.unreadable]
    total = len(sources.files) + len(skipped)
    deliveries = _Deliveries(IN_FLIGHT_BYTES, DELIVERY_TIMEOUT_S)
    interrupted = False
    begun = time.monotonic()
    try:
        for done, file in enumerate(sources.files, start=1 + len(skipped)):
            if deliveries.failed:  # a broker that is gone, or a topic that refuses: the next file would fare no better
                break
            message = _read(file, min(max_bytes, message_limit), message_limit, only_images=only_images)
            if isinstance(message, Skipped):
                wanted = message.wanted or (skip_too_large and message.reason is Reason.TOO_LARGE)
                skipped.append(Skipped(message.path, message.reason, message.detail, wanted))
            else:
                deliveries.send(producer, topic, message, file.name)
            if on_progress:
                on_progress(Progress(done, total, deliveries.sent, deliveries.bytes))
        deliveries.finish()
    except KeyboardInterrupt:
        interrupted = True
        deliveries.finish()
    finally:
        seconds = time.monotonic() - begun
        _close(producer)
    return PublishSummary(
        topic, total, deliveries.sent, deliveries.bytes, seconds, skipped, deliveries.failed, interrupted
    )


def _topic_limit(bootstrap_servers: str, topic: str, timeout_s: float) -> int:
    """The largest message in bytes, headers included, that `topic` takes; the topic is made if it is not there."""
    from kafka.admin import ConfigResource, ConfigResourceType, KafkaAdminClient, NewTopic
    from kafka.errors import KafkaError, TopicAlreadyExistsError

    # Its retries are no concern of the user's; a program that wants to see them gives the logger "kafka" a handler.
    logging.getLogger("kafka").addHandler(logging.NullHandler())
    try:
        admin = KafkaAdminClient(bootstrap_servers=bootstrap_servers, bootstrap_timeout_ms=int(timeout_s * 1000))
    except (KafkaError, ValueError) as error:
        raise PublishError(
            f"no Kafka broker answered at {bootstrap_servers!r} within {timeout_s:g} s: start the home's own "
            "with `imagestream broker start`, or name another with --bootstrap-servers"
        ) from error
    try:
        if topic not in admin.list_topics():
            with suppress(TopicAlreadyExistsError):  # another process was quicker
                admin.create_topics([NewTopic(topic, num_partitions=-1, replication_factor=-1)])
        asked = ConfigResource(ConfigResourceType.TOPIC, topic, ["max.message.bytes"])
        answer: dict[str, Any] = admin.describe_configs([asked], config_filter="all")
        return int(answer["topic"][topic]["max.message.bytes"]["value"])
    except (KeyError, TypeError):  # a broker may keep its configuration to itself
        return MAX_MESSAGE_BYTES + HEADER_MARGIN_BYTES
    except (KafkaError, ValueError) as error:
        raise PublishError(f"topic {topic!r} at {bootstrap_servers!r} cannot be written to: {error}") from error
    finally:
        admin.close()


def _producer(bootstrap_servers: str, max_message_bytes: int, timeout_s: float) -> "KafkaProducer":
    from kafka import KafkaProducer
    from kafka.record import util as record_util

    if record_util.crc32c_c is None:  # the checksum in Python alone makes publishing twenty times slower
        raise PublishError("kafka-python does not find the package crc32c: install it")
    return KafkaProducer(
        bootstrap_servers=bootstrap_servers,
        client_id="imagestream-publish",
        acks="all",
        enable_idempotence=True,
        max_request_size=max_message_bytes,
        batch_size=min(BATCH_BYTES, max_message_bytes),  # the limit of a topic holds for a batch as for a message
        linger_ms=LINGER_MS,
        compression_type=None,  # an encoded image does not shrink any further
        bootstrap_timeout_ms=int(timeout_s * 1000),
        max_block_ms=int(timeout_s * 1000),
        request_timeout_ms=int(DELIVERY_TIMEOUT_S * 1000 / 2),
        delivery_timeout_ms=int(DELIVERY_TIMEOUT_S * 1000),
    )


def _close(producer: "KafkaProducer") -> None:
    from kafka.errors import KafkaTimeoutError

    try:
        producer.close(timeout=1)
    except KafkaTimeoutError:  # it closes only when nothing is under way: give up what a silent broker left there
        producer._sender.force_close()
        producer.close(timeout=1)


def _read(file: SourceFile, max_bytes: int, max_message_bytes: int, *, only_images: bool) -> Message | Skipped:
    """The message for a file of at most `max_bytes`, or why there is none; a larger file is not read to its end."""
    try:
        with open(file.name, "rb") as stream:  # noqa: PTH123  the name as it was given
            head = stream.read(SNIFF_BYTES)
            if only_images and content_type(head) == UNKNOWN_CONTENT:
                return Skipped(file.name, Reason.NOT_AN_IMAGE, "by its first bytes", wanted=True)
            size = os.fstat(stream.fileno()).st_size
            data = b"" if size > max_bytes else head + stream.read(max_bytes + 1 - len(head))
    except OSError as error:
        return Skipped(file.name, Reason.UNREADABLE, error.strerror or str(error))
    if max(size, len(data)) > max_bytes:
        return Skipped(file.name, Reason.TOO_LARGE, f"{max(size, len(data)):,} bytes, at most {max_bytes:,} are taken")
    message = build_message(data, file.name, label=file.label)
    if _size(message) > max_message_bytes:
        detail = f"{_size(message):,} bytes with its headers, the topic takes {max_message_bytes:,}"
        return Skipped(file.name, Reason.TOO_LARGE, detail)
    return message


def _size(message: Message) -> int:
    """The bytes of a message in a batch of its own, as kafka-python and the broker count them."""
    from kafka.record.default_records import DefaultRecordBatchBuilder

    return int(DefaultRecordBatchBuilder.estimate_size_in_bytes(message.key, message.value, message.headers))


class _Deliveries:
    """Messages under way to the broker, bounded in bytes, and what became of the others.

    The callbacks run on the producer's own thread. The waiting is ours and not `flush()`, which in kafka-python 3.0.12
    does not come back while a broker holds its connections open without answering.
    """

    def __init__(self, limit_bytes: int, patience_s: float) -> None:
        self.sent = 0
        self.bytes = 0
        self.failed: list[Failed] = []
        self._limit_bytes = limit_bytes
        self._patience_s = patience_s
        self._numbers = count()
        self._under_way: dict[int, tuple[str, int]] = {}  # number → name, bytes
        self._in_flight_bytes = 0
        self._changed = threading.Condition()

    def send(self, producer: "KafkaProducer", topic: str, message: Message, name: str) -> None:
        """Hand a message to the producer once there is room for it; one larger than the bound goes alone."""
        from kafka.errors import KafkaError

        size = len(message.value)
        number = next(self._numbers)
        with self._changed:
            self._wait_until(lambda: not self._under_way or self._in_flight_bytes + size <= self._limit_bytes)
            self._under_way[number] = (name, size)
            self._in_flight_bytes += size
        try:
            future = producer.send(topic, message.value, message.key, message.headers)
        except KafkaError as error:
            self._on_failed(number, error)
        else:
            future.add_callback(partial(self._on_sent, number))
            future.add_errback(partial(self._on_failed, number))

    def finish(self) -> None:
        """Wait for the answers to everything that is under way."""
        with self._changed:
            self._wait_until(lambda: not self._under_way)

    def _wait_until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            if not self._changed.wait(self._patience_s):  # not one answer in all that time
                for number in list(self._under_way):
                    self._settle(number, f"the broker gave no answer for {self._patience_s:g} s")

    def _settle(self, number: int, failure: str | None) -> None:
        # An answer may come after we have given up on it: what was told about that file stands.
        name, size = self._under_way.pop(number, ("", 0))
        self._in_flight_bytes -= size
        if name and failure is not None:
            self.failed.append(Failed(name, failure))
        elif name:
            self.sent += 1
            self.bytes += size
        self._changed.notify_all()

    def _on_sent(self, number: int, _metadata: object) -> None:
        with self._changed:
            self._settle(number, None)

    def _on_failed(self, number: int, error: BaseException) -> None:
        with self._changed:
            self._settle(number, str(error) or type(error).__name__)
