"""The witness: what Kafka says of topics and logs after a micro-batch was read, rules C7 and C8 of the accounting."""

from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from streaming.errors import ServiceError
from streaming.pipeline.account import Place, Seen, WitnessError
from streaming.platform.kafka_client import connect
from streaming.platform.topic import OPEN, TIMEOUT_MS

TakeWitness = Callable[[Collection[str], Collection[Place]], "Future[Seen]"]


class Witness:
    """Asks Kafka for topic ids and log starts in a thread of its own, over one connection that is kept open.

    Args:
        client: kafka-python's arguments, as `kafka_security.client_arguments` makes them.
    """

    def __init__(self, bootstrap_servers: str, client: Mapping[str, Any] = OPEN) -> None:
        self._servers = bootstrap_servers
        self._client = client
        self._admin: Any = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="witness")

    def take(self, topics: Collection[str], places: Collection[Place]) -> "Future[Seen]":
        """What Kafka says from now on.

        Args:
            topics: names in Kafka.
            places: of which the start of the log is asked for.

        Returns:
            The answer, or a WitnessError.
        """
        return self._thread.submit(self._ask, topics, places)

    def _ask(self, topics: Collection[str], places: Collection[Place]) -> Seen:
        from kafka import TopicPartition
        from kafka.admin import KafkaAdminClient, OffsetSpec
        from kafka.errors import KafkaError

        try:
            if self._admin is None:
                timeouts = {"request_timeout_ms": TIMEOUT_MS, "bootstrap_timeout_ms": TIMEOUT_MS}
                self._admin = connect(
                    KafkaAdminClient, bootstrap_servers=self._servers, client_id="imagestream-witness",
                    **timeouts, **self._client,
                )  # fmt: skip
            described = self._admin.describe_topics(list(topics))
            partitions = {TopicPartition(*place): OffsetSpec.EARLIEST for place in places}
            starts = self._admin.list_partition_offsets(partitions) if partitions else {}
        except (KafkaError, ServiceError, ValueError, OSError) as error:
            self._disconnect()
            raise WitnessError(f"Kafka did not confirm the topics that were read: {error}") from error
        return Seen(
            {one["name"]: str(one["topic_id"]) for one in described if not one["error_code"]},
            {(one.topic, one.partition): found.offset for one, found in starts.items()},
        )

    def close(self) -> None:
        """Disconnect; what was asked for and not answered is given up."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._disconnect()

    def _disconnect(self) -> None:
        admin, self._admin = self._admin, None
        if admin is not None:
            with suppress(Exception):  # it may be in use just now, or already be broken
                admin.close()
