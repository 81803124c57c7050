"""The offsets of topics in Kafka, and the lag: how many of them have no row yet."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from streaming.errors import ServiceError
from streaming.pipeline.decisions import TopicPartition
from streaming.platform.kafka_client import connect
from streaming.platform.kafka_probe import RefusedError
from streaming.platform.topic import OPEN, TOPIC_AUTHORIZATION_FAILED, TopicOperation, permission_error

if TYPE_CHECKING:
    from kafka.admin import KafkaAdminClient

TIMEOUT_MS = 5_000
COMMITTED = "read_committed"


class PartitionOffsets(NamedTuple):
    """The offsets of a topic partition.

    Attributes:
        begin: the start of the log, the oldest offset that the broker has.
        end: one past the last readable message: the last stable offset with `read_committed`, else the high watermark.
        held: the number of offsets after `end` that an open transaction holds back.
    """

    begin: int
    end: int
    held: int = 0


OffsetsByPartition = Mapping[TopicPartition, PartitionOffsets]


@dataclass(frozen=True)
class PartitionLag:
    """The lag of a topic partition; None if the broker, or the tables, have no offset. See `PartitionOffsets`."""

    topic: str
    partition: int
    committed: int | None  # one past the last message that has its row
    end: int | None
    begin: int | None
    held: int | None = None

    @property
    def lag(self) -> int | None:
        """The number of offsets without a row; None if the broker did not answer."""
        if self.end is None:
            return None
        return max(0, self.end - max(self.committed or 0, self.begin or 0))


class TopicOffsets:
    """Fetches the offsets of topics over one connection, which is kept open.

    Args:
        topics: names in Kafka.
        client: security arguments from `kafka_security.client_arguments`.
        isolation: `read_committed` or `read_uncommitted`.

    Attributes:
        refused: why the broker denied access at the last `read`; None if it did not.
    """

    def __init__(
        self,
        bootstrap_servers: str,
        topics: Sequence[str],
        client: Mapping[str, Any] = OPEN,
        isolation: str = COMMITTED,
    ) -> None:
        self.refused: str | None = None
        self._client = client
        self._servers = bootstrap_servers
        self._topics = list(topics)
        self._isolation = isolation
        self._admin: KafkaAdminClient | None = None

    def read(self) -> OffsetsByPartition | None:
        """The offsets of each partition of existing topics; None if the broker does not answer or denies access."""
        from kafka.admin import KafkaAdminClient
        from kafka.errors import AuthorizationError, KafkaError

        self.refused = None
        try:
            if self._admin is None:
                self._admin = connect(
                    KafkaAdminClient,
                    bootstrap_servers=self._servers,
                    client_id="imagestream-lag",
                    bootstrap_timeout_ms=TIMEOUT_MS,
                    request_timeout_ms=TIMEOUT_MS,
                    **self._client,
                )
            return self._read(self._admin)
        except RefusedError as error:
            self.refused = str(error)
            return None
        except AuthorizationError:
            self.refused = permission_error(", ".join(self._topics), TopicOperation.READ, self._client)
            self.close()
            return None
        except (KafkaError, ServiceError, ValueError, OSError):
            self.close()
            return None

    def _read(self, admin: "KafkaAdminClient") -> OffsetsByPartition:
        from kafka import IsolationLevel
        from kafka import TopicPartition as KafkaTopicPartition
        from kafka.admin import OffsetSpec

        partitions = [
            KafkaTopicPartition(topic["name"], one["partition_index"])
            for topic in admin.describe_topics(self._topics)
            if topic["error_code"] != TOPIC_AUTHORIZATION_FAILED
            for one in topic["partitions"]
        ]
        if not partitions:
            return {}
        latest = dict.fromkeys(partitions, OffsetSpec.LATEST)
        begins = admin.list_partition_offsets(dict.fromkeys(partitions, OffsetSpec.EARLIEST))
        level = IsolationLevel.READ_COMMITTED if self._isolation == COMMITTED else IsolationLevel.READ_UNCOMMITTED
        ends = admin.list_partition_offsets(latest, isolation_level=level)
        written = ends if self._isolation != COMMITTED else admin.list_partition_offsets(latest)
        return {
            (one.topic, one.partition): PartitionOffsets(
                begins[one].offset, ends[one].offset, max(0, written[one].offset - ends[one].offset)
            )
            for one in partitions
        }

    def close(self) -> None:
        """Close the connection; the next `read` opens a new one."""
        if self._admin is not None:
            self._admin.close()
            self._admin = None


def lags(committed: Mapping[TopicPartition, int], offsets: OffsetsByPartition | None) -> list[PartitionLag]:
    """The lag of every partition that has committed offsets or offsets in Kafka, in order."""
    known = offsets or {}
    return [
        PartitionLag(
            *partition,
            committed.get(partition),
            end=known[partition].end if partition in known else None,
            begin=known[partition].begin if partition in known else None,
            held=known[partition].held if partition in known else None,
        )
        for partition in sorted({*committed, *known})
    ]
