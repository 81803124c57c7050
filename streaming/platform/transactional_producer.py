"""A Kafka producer of transactions in which every wait has a time limit.

kafka-python's `send_offsets_to_transaction` and `commit_transaction` wait without limit for a broker that is down, and
its `close` first waits for messages that are never committed. This module therefore uses attributes that kafka-python
does not document: `UNDOCUMENTED` lists them, and a test looks for each in the installed version.

Source: KIP-98, "Exactly Once Delivery and Transactional Messaging"; kafka-python 3.0.12, `kafka/producer/kafka.py`.
"""

from collections.abc import Mapping
from contextlib import closing, suppress
from typing import Any

from streaming.platform.kafka_client import connect

UNDOCUMENTED = (
    "_sender.force_close",
    "_sender.wakeup",
    "_transaction_manager.begin_commit",
    "_transaction_manager.last_error",
    "_transaction_manager.send_offsets_to_transaction",
)
TRANSACTION_TIMEOUT_MS = 60_000  # after which the broker aborts the transaction of a dead process
CONNECT_TIMEOUT_S = 10.0
BATCH_BYTES = 256 * 1024
RETRY_MS = 20  # the broker may still be completing the previous transaction
GROUP_OFFSETS = "__consumer_offsets"
IN_FLIGHT = 5_000  # maximum number of messages that are not acknowledged yet


class TransactionalProducer:
    """A producer with a transactional id; used by one thread at a time, and discarded after any error.

    Args:
        servers: brokers, host:port,…
        limit_s: maximum time for each request, its retries included, in seconds.
        client: security arguments from `kafka_security.client_arguments`.

    Raises:
        kafka.errors.KafkaError: no broker answers, or it is too old for transactions.
        RefusedError: the broker does not accept this client.
        ValueError: an address is invalid.
    """

    def __init__(self, servers: str, transactional_id: str, limit_s: float, client: Mapping[str, Any]) -> None:
        from kafka import KafkaProducer

        self._limit_s = limit_s
        self._unacknowledged: list[Any] = []
        self._producer = connect(
            KafkaProducer,
            bootstrap_servers=servers,
            client_id="imagestream-answers",
            transactional_id=transactional_id,
            transaction_timeout_ms=TRANSACTION_TIMEOUT_MS,
            acks="all",
            batch_size=BATCH_BYTES,
            retry_backoff_ms=RETRY_MS,
            bootstrap_timeout_ms=int(CONNECT_TIMEOUT_S * 1000),
            max_block_ms=int(limit_s * 1000),
            request_timeout_ms=int(limit_s * 1000 / 2),
            delivery_timeout_ms=int(limit_s * 1000),
            **client,
        )

    def fence(self) -> None:
        """Complete or abort the open transaction of earlier producers with this id, and fence them.

        Raises:
            kafka.errors.KafkaError: the broker has no transactions, refuses the id or does not answer in time.
        """
        self._producer.init_transactions()

    def begin(self) -> None:
        """Begin a transaction; raises a `KafkaError` if this producer has failed before."""
        self._unacknowledged.clear()
        self._producer.begin_transaction()

    def send(self, topic: str, value: bytes, key: bytes | None, headers: list[tuple[str, bytes]]) -> None:
        """Send a message as part of the transaction; now and then waits for the broker.

        Raises:
            kafka.errors.KafkaError: it, or an earlier message, was not acknowledged in time.
        """
        self._unacknowledged.append(self._producer.send(topic, value, key, headers))
        if len(self._unacknowledged) >= IN_FLIGHT:
            self.flush()

    def flush(self) -> None:
        """Wait until every message is acknowledged; raises a `KafkaError` if one is not acknowledged in time."""
        for one in self._unacknowledged:
            one.get(self._limit_s)
        self._unacknowledged.clear()

    def commit(self, topic: str, offset: int, group: str) -> None:
        """Commit the transaction together with an offset of a consumer group on partition 0 of the topic.

        Raises:
            kafka.errors.KafkaError: the broker refuses it, or does not answer in time: whether the transaction was
                committed is then known once another producer has called `fence`.
        """
        from kafka import TopicPartition
        from kafka.structs import OffsetAndMetadata

        transaction = self._producer._transaction_manager
        offsets = {TopicPartition(topic, 0): OffsetAndMetadata(offset, "", -1)}
        self._wait(transaction.send_offsets_to_transaction(offsets, group))
        self._wait(transaction.begin_commit())

    @property
    def is_fenced(self) -> bool:
        """Whether the broker has reported that a newer producer uses the transactional id."""
        return is_fencing(self._producer._transaction_manager.last_error)

    def abandon(self) -> None:
        """Close without waiting; an open transaction is aborted by the next producer, or by the broker in time."""
        from kafka.errors import KafkaError

        self._producer._sender.force_close()
        with suppress(KafkaError):
            self._producer.close(timeout=1)

    def _wait(self, result: Any) -> None:
        from kafka.errors import KafkaTimeoutError

        self._producer._sender.wakeup()
        if not result.wait(self._limit_s * 1000):
            raise KafkaTimeoutError(f"no answer for {self._limit_s:g} s")


def topics_in_transaction(servers: str, transactional_id: str, client: Mapping[str, Any]) -> set[str]:
    """The topics that the open transaction of an id has written to, excluding the offsets of groups.

    Empty if there is no open transaction, or the broker is older than Kafka 3.0, which introduced the request.

    Raises:
        kafka.errors.KafkaError: no broker answers.
    """
    from kafka.admin import KafkaAdminClient
    from kafka.errors import BrokerResponseError

    with closing(
        connect(
            KafkaAdminClient,
            bootstrap_servers=servers,
            bootstrap_timeout_ms=int(CONNECT_TIMEOUT_S * 1000),
            request_timeout_ms=int(CONNECT_TIMEOUT_S * 1000),
            **client,
        )
    ) as admin:
        try:
            found = admin.describe_transactions([transactional_id])[transactional_id]
        except (
            BrokerResponseError,
            KeyError,
        ):  # also for an id that was never used, or that this client may not describe
            return set()
    is_open = found.state == "Ongoing"
    return {one.topic for one in found.topic_partitions} - {GROUP_OFFSETS} if is_open else set()


def is_fencing(error: BaseException | None) -> bool:
    """Whether an error says that a newer producer uses the transactional id."""
    from kafka.errors import InvalidProducerEpochError, ProducerFencedError

    return isinstance(error, ProducerFencedError | InvalidProducerEpochError)
