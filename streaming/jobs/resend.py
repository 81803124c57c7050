"""Sends quarantined rows to Kafka as the original messages: value, key, headers and timestamp.

A header `imagestream-replay-of` is added, with the topic, partition and offset of the original. For rows of earlier
releases, which have no key and headers, these are built from image id, source and label.
"""

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import Any

from producer.client import close_producer
from producer.message import HEADER_MARGIN_BYTES, HEADER_REPLAY_OF, HEADER_TIMESTAMP, MAX_MESSAGE_BYTES, build_message
from streaming.errors import UnavailableError
from streaming.pipeline.positions import name_in_kafka
from streaming.platform.kafka_client import connect
from streaming.platform.topic import topic_configuration

IN_FLIGHT_BYTES = 32 * 1024**2
CONNECT_TIMEOUT_S = 10.0
DELIVERY_TIMEOUT_S = 30.0

Identity = tuple[str, int, int]  # topic, partition, offset


@dataclass(frozen=True)
class ResentRow:
    """A row that was sent to the broker."""

    identity: Identity
    reason: str
    bytes: int


@dataclass(frozen=True)
class _Original:
    """An original message with added headers."""

    topic: str  # in Kafka
    partition: int
    key: bytes | None
    value: bytes | None
    headers: list[tuple[str, bytes | None]]
    timestamp_ms: int | None  # None: now


@dataclass(frozen=True)
class _Acknowledged:
    """The future of an acknowledged message."""

    def get(self, timeout: float) -> None:
        """Return at once, like the `get` of kafka-python's future."""


class Resender:
    """Sends rows, with at most IN_FLIGHT_BYTES in flight, and collects the results.

    Args:
        client: security arguments from `kafka_security.client_arguments`.

    Attributes:
        acknowledged: rows that the broker has acknowledged.
        refused: the number of rows that were too large.
        failed: the first other error.

    Raises:
        ServiceError: no broker answers.
    """

    def __init__(self, bootstrap_servers: str, client: Mapping[str, Any]) -> None:
        from kafka import KafkaProducer
        from kafka.errors import KafkaError

        self.acknowledged: list[ResentRow] = []
        self.refused = 0
        self.failed: str | None = None
        self._servers = bootstrap_servers
        self._client = client
        self._second: Any = None  # an admin client, created if necessary
        self._kept_ms: dict[str, float] = {}  # topic → retention by the messages' own timestamps
        self._waiting: deque[tuple[ResentRow, Any]] = deque()
        self._waiting_bytes = 0
        try:
            self._producer = connect(
                KafkaProducer,
                bootstrap_servers=bootstrap_servers,
                client_id="imagestream-replay",
                acks="all",
                # In kafka-python 3.0.12, an idempotent producer rejects all messages after one that was too large.
                enable_idempotence=False,
                max_request_size=MAX_MESSAGE_BYTES + HEADER_MARGIN_BYTES,
                batch_size=0,  # a topic's limit applies to batches, so that one large message would fail others
                compression_type=None,
                bootstrap_timeout_ms=int(CONNECT_TIMEOUT_S * 1000),
                max_block_ms=int(CONNECT_TIMEOUT_S * 1000),
                request_timeout_ms=int(DELIVERY_TIMEOUT_S * 1000 / 2),
                delivery_timeout_ms=int(DELIVERY_TIMEOUT_S * 1000),
                **client,
            )
        except (KafkaError, ValueError) as error:
            raise UnavailableError(
                f"no Kafka broker answers at {bootstrap_servers} ({error}): start the home's broker with "
                "'imagestream broker start', or check --bootstrap-servers"
            ) from error

    def send(self, row: dict[str, Any]) -> None:
        """Send one row of the quarantine, waiting if too much is in flight."""
        from kafka.errors import KafkaError, MessageSizeTooLargeError

        value = row["value"]  # None if the message had none
        size = len(value or b"")
        while self._waiting and self._waiting_bytes + size > IN_FLIGHT_BYTES:
            self._collect()
        sent = ResentRow((row["topic"], row["partition"], row["offset"]), row["reason"], size)
        message = self._original(row)
        try:
            if any(one is None for _, one in message.headers):
                self._send_alone(message)
                future: Any = _Acknowledged()
            else:
                future = self._producer.send(
                    message.topic, value, message.key, message.headers, timestamp_ms=message.timestamp_ms
                )
        except MessageSizeTooLargeError:
            self.refused += 1
        except KafkaError as error:
            self.failed = str(error) or type(error).__name__
        else:
            self._waiting.append((sent, future))
            self._waiting_bytes += size

    def _original(self, row: Mapping[str, Any]) -> "_Original":
        topic = name_in_kafka(row["topic"])
        mark = (HEADER_REPLAY_OF, f"{row['topic']}/{row['partition']}/{row['offset']}".encode())
        value, timestamp = row["value"], row.get("timestamp_ms")
        if timestamp is None:  # a row of an earlier release
            made = build_message(value or b"", row["source"] or "", label=row["label_true"], image_id=row["image_id"])
            return _Original(topic, row["partition"], made.key, value, [*made.headers, mark], None)
        headers = [(one["key"], one["value"]) for one in row["headers"] or ()] + [mark]
        if timestamp < 0 or self._expires_soon(topic, timestamp):
            headers.append((HEADER_TIMESTAMP, str(timestamp).encode()))
            timestamp = None
        return _Original(topic, row["partition"], row["key"], value, headers, timestamp)

    def _expires_soon(self, topic: str, timestamp_ms: int) -> bool:
        """Whether the broker would soon delete a message with this timestamp, by its retention."""
        if topic not in self._kept_ms:
            found = topic_configuration(self._admin(), topic)
            by_append = found.get("message.timestamp.type") == "LogAppendTime"
            deletes = "delete" in found.get("cleanup.policy", "delete")
            retention_ms = int(found.get("retention.ms", -1))
            self._kept_ms[topic] = inf if by_append or not deletes or retention_ms < 0 else retention_ms
        return time.time() * 1000 - timestamp_ms > self._kept_ms[topic] / 2

    def _admin(self) -> Any:
        from kafka.admin import KafkaAdminClient

        if self._second is None:
            timeout = {"request_timeout_ms": int(DELIVERY_TIMEOUT_S * 1000)}
            self._second = connect(KafkaAdminClient, bootstrap_servers=self._servers, **timeout, **self._client)
        return self._second

    def _send_alone(self, message: "_Original") -> None:
        """Send a message with a null header value, which kafka-python's producer does not accept.

        Raises:
            kafka.errors.KafkaError: the broker rejected it.
        """
        from kafka import TopicPartition
        from kafka.errors import for_code
        from kafka.protocol.producer import ProduceRequest
        from kafka.record.default_records import DefaultRecordBatchBuilder

        builder = DefaultRecordBatchBuilder(
            magic=2, compression_type=0, is_transactional=0, producer_id=-1, producer_epoch=-1, base_sequence=-1,
            batch_size=2 * MAX_MESSAGE_BYTES,
        )  # fmt: skip
        at = int(time.time() * 1000) if message.timestamp_ms is None else message.timestamp_ms
        builder.append(0, at, message.key, message.value, message.headers)
        topics = ProduceRequest.TopicProduceData
        part = topics.PartitionProduceData(index=message.partition, records=bytes(builder.build()))
        request = ProduceRequest(
            transactional_id=None, acks=-1, timeout_ms=int(DELIVERY_TIMEOUT_S * 1000),
            topic_data=[topics(name=message.topic, partition_data=[part])], min_version=3, max_version=9,
        )  # fmt: skip
        admin = self._admin()

        async def send() -> Any:
            (leader,) = await admin._async_get_leader_for_partitions({TopicPartition(message.topic, message.partition)})
            return await admin._manager.send(request, node_id=leader)

        (answer,) = admin._manager.run(send).responses[0].partition_responses
        if answer.error_code:
            raise for_code(answer.error_code)(f"topic {message.topic!r} partition {message.partition}")

    def flush(self) -> None:
        """Wait for the results of all messages in flight."""
        while self._waiting:
            self._collect()

    def _collect(self) -> None:
        from kafka.errors import KafkaError, MessageSizeTooLargeError

        sent, future = self._waiting.popleft()
        self._waiting_bytes -= sent.bytes
        try:
            future.get(timeout=DELIVERY_TIMEOUT_S if self.failed is None else 0.1)
        except MessageSizeTooLargeError:
            self.refused += 1
        except KafkaError as error:
            self.failed = self.failed or str(error) or type(error).__name__
        else:
            self.acknowledged.append(sent)

    def close(self) -> None:
        if self._second is not None:
            self._second.close()
        close_producer(self._producer)
