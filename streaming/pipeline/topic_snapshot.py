"""Snapshots of the state of topics in Kafka after a micro-batch was read, for rules C7 and C8 of the reconciliation."""

from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from streaming.errors import ServiceError
from streaming.pipeline.decisions import TopicPartition
from streaming.pipeline.reconcile import TopicSnapshot, WitnessError
from streaming.platform.kafka_client import connect
from streaming.platform.topic import OPEN, TIMEOUT_MS

TakeSnapshot = Callable[[Collection[str], Collection[TopicPartition]], "Future[TopicSnapshot]"]


class SnapshotReader:
    """Fetches topic ids and log starts from Kafka in a background thread, over one connection that is kept open.

    Args:
        client: security arguments from `kafka_security.client_arguments`.
    """

    def __init__(self, bootstrap_servers: str, client: Mapping[str, Any] = OPEN) -> None:
        self._servers = bootstrap_servers
        self._client = client
        self._admin: Any = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="topic-snapshot")

    def take(self, topics: Collection[str], partitions: Collection[TopicPartition]) -> "Future[TopicSnapshot]":
        """Start to fetch the state of topics.

        Args:
            topics: names in Kafka.
            partitions: whose log start is fetched.

        Returns:
            A future of the snapshot; it raises a WitnessError if Kafka does not answer.
        """
        return self._thread.submit(self._fetch, topics, partitions)

    def _fetch(self, topics: Collection[str], partitions: Collection[TopicPartition]) -> TopicSnapshot:
        from kafka import TopicPartition as KafkaTopicPartition
        from kafka.admin import KafkaAdminClient, OffsetSpec
        from kafka.errors import KafkaError

        try:
            if self._admin is None:
                timeouts = {"request_timeout_ms": TIMEOUT_MS, "bootstrap_timeout_ms": TIMEOUT_MS}
                self._admin = connect(
                    KafkaAdminClient, bootstrap_servers=self._servers, client_id="imagestream-snapshot",
                    **timeouts, **self._client,
                )  # fmt: skip
            described = self._admin.describe_topics(list(topics))
            earliest = {KafkaTopicPartition(*one): OffsetSpec.EARLIEST for one in partitions}
            starts = self._admin.list_partition_offsets(earliest) if earliest else {}
        except (KafkaError, ServiceError, ValueError, OSError) as error:
            self._disconnect()
            raise WitnessError(f"Kafka did not confirm the topics that were read: {error}") from error
        return TopicSnapshot(
            {one["name"]: str(one["topic_id"]) for one in described if not one["error_code"]},
            {(one.topic, one.partition): found.offset for one, found in starts.items()},
        )

    def close(self) -> None:
        """Disconnect, and cancel requests that have not been answered."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._disconnect()

    def _disconnect(self) -> None:
        admin, self._admin = self._admin, None
        if admin is not None:
            with suppress(Exception):  # it may be in use, or already broken
                admin.close()
