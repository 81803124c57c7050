"""Sending quarantined rows to Kafka, each as the message it was: raw bytes, key, source and label."""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from producer.message import HEADER_MARGIN_BYTES, MAX_MESSAGE_BYTES, build_message
from streaming.errors import ServiceError
from streaming.pipeline.positions import name_in_kafka
from streaming.platform.kafka_client import connect

IN_FLIGHT_BYTES = 32 * 1024**2
CONNECT_TIMEOUT_S = 10.0
DELIVERY_TIMEOUT_S = 30.0

Identity = tuple[str, int, int]  # topic, partition, offset


@dataclass(frozen=True)
class Sent:
    """A row under way to the broker, or acknowledged by it."""

    identity: Identity
    reason: str
    bytes: int


class Sender:
    """Sends rows, with at most IN_FLIGHT_BYTES under way, and collects what became of them."""

    def __init__(self, bootstrap_servers: str, client: Mapping[str, Any]) -> None:
        from kafka import KafkaProducer
        from kafka.errors import KafkaError

        self.acknowledged: list[Sent] = []
        self.refused = 0
        self.failed: str | None = None
        self._waiting: deque[tuple[Sent, Any]] = deque()
        self._waiting_bytes = 0
        try:
            self._producer = connect(
                KafkaProducer,
                bootstrap_servers=bootstrap_servers,
                client_id="imagestream-replay",
                acks="all",
                # In kafka-python 3.0.12 an idempotent producer refuses everything after one message that was too large.
                enable_idempotence=False,
                max_request_size=MAX_MESSAGE_BYTES + HEADER_MARGIN_BYTES,
                batch_size=0,  # the limit of a topic holds for a batch: alone, only a message too large itself fails
                compression_type=None,
                bootstrap_timeout_ms=int(CONNECT_TIMEOUT_S * 1000),
                max_block_ms=int(CONNECT_TIMEOUT_S * 1000),
                request_timeout_ms=int(DELIVERY_TIMEOUT_S * 1000 / 2),
                delivery_timeout_ms=int(DELIVERY_TIMEOUT_S * 1000),
                **client,
            )
        except (KafkaError, ValueError) as error:
            raise ServiceError(
                f"no Kafka broker answers at {bootstrap_servers} ({error}); "
                "start the home's own with 'imagestream broker start', or check --bootstrap-servers"
            ) from error

    def send(self, row: dict[str, Any]) -> None:
        """Send one row of the quarantine, once there is room for it."""
        from kafka.errors import KafkaError, MessageSizeTooLargeError

        value = row["value"]  # None where the message had none
        size = len(value or b"")
        while self._waiting and self._waiting_bytes + size > IN_FLIGHT_BYTES:
            self._settle()
        sent = Sent((row["topic"], row["partition"], row["offset"]), row["reason"], size)
        message = build_message(value or b"", row["source"] or "", label=row["label_true"], image_id=row["image_id"])
        try:
            future = self._producer.send(name_in_kafka(row["topic"]), value, message.key, message.headers)
        except MessageSizeTooLargeError:
            self.refused += 1
        except KafkaError as error:
            self.failed = str(error) or type(error).__name__
        else:
            self._waiting.append((sent, future))
            self._waiting_bytes += size

    def flush(self) -> None:
        """Wait for the answers to everything that is under way."""
        while self._waiting:
            self._settle()

    def _settle(self) -> None:
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
        from kafka.errors import KafkaTimeoutError

        try:
            self._producer.close(timeout=1)
        except KafkaTimeoutError:  # it closes only when nothing is under way: give up what a silent broker left there
            self._producer._sender.force_close()
            self._producer.close(timeout=1)
