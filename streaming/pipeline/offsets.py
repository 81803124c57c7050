"""How far a topic reaches, and how far that is from what the tables have: the lag."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from streaming.errors import ServiceError
from streaming.platform.kafka_client import connect
from streaming.platform.kafka_probe import RefusedError
from streaming.platform.topic import OPEN, TOPIC_AUTHORIZATION_FAILED, Right, no_right

if TYPE_CHECKING:
    from kafka.admin import KafkaAdminClient

TIMEOUT_MS = 5_000
COMMITTED = "read_committed"


class Reach(NamedTuple):
    """The offsets of a topic partition.

    Attributes:
        begin: of the oldest message that the broker still has.
        end: one past the last message that can be read: in front of the first open transaction, where messages of
            aborted ones are not read.
        held: offsets from there on that are not read before the transaction is committed or aborted.
    """

    begin: int
    end: int
    held: int = 0


Place = tuple[str, int]  # topic in Kafka, partition
Reaches = Mapping[Place, Reach]


@dataclass(frozen=True)
class PartitionLag:
    """One topic partition; None where the broker, or the tables, say nothing about it; offsets as in `Reach`."""

    topic: str
    partition: int
    committed: int | None  # one past the last message that has its row
    end: int | None
    begin: int | None
    held: int | None = None

    @property
    def lag(self) -> int | None:
        """Offsets whose messages wait for their row."""
        if self.end is None:
            return None
        return max(0, self.end - max(self.committed or 0, self.begin or 0))


class TopicOffsets:
    """Asks the broker for the offsets of topics; one connection, kept for as long as it works.

    Attributes:
        refused: why the broker did not let us in at the last `read`, if that was it.
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

    def read(self) -> Reaches | None:
        """The offsets of each partition; none of a topic that is not there, None without a broker."""
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
            self.refused = no_right(", ".join(self._topics), Right.READ, self._client)
            self.close()
            return None
        except (KafkaError, ServiceError, ValueError, OSError):
            self.close()
            return None

    def _read(self, admin: "KafkaAdminClient") -> Reaches:
        from kafka import IsolationLevel, TopicPartition
        from kafka.admin import OffsetSpec

        partitions = [
            TopicPartition(topic["name"], one["partition_index"])
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
            (one.topic, one.partition): Reach(
                begins[one].offset, ends[one].offset, max(0, written[one].offset - ends[one].offset)
            )
            for one in partitions
        }

    def close(self) -> None:
        """Give the connection back; the next `read` opens another."""
        if self._admin is not None:
            self._admin.close()
            self._admin = None


def lags(committed: Mapping[Place, int], offsets: Reaches | None) -> list[PartitionLag]:
    """Both sides of every partition that either side knows."""
    known = offsets or {}
    return [
        PartitionLag(
            *place,
            committed.get(place),
            end=known[place].end if place in known else None,
            begin=known[place].begin if place in known else None,
            held=known[place].held if place in known else None,
        )
        for place in sorted({*committed, *known})
    ]
