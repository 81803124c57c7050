"""How far a topic reaches, and how far that is from what the tables have: the lag."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from streaming.platform.kafka_client import connect
from streaming.platform.kafka_probe import RefusedError
from streaming.platform.topic import OPEN, Right, no_right

if TYPE_CHECKING:
    from kafka import KafkaConsumer

TIMEOUT_MS = 5_000


@dataclass(frozen=True)
class PartitionLag:
    """One topic partition; None where the broker, or the tables, say nothing of it."""

    partition: int
    committed: int | None  # one past the last message that has its row
    end: int | None  # one past the last message that the broker has
    begin: int | None  # the oldest message that the broker still has

    @property
    def lag(self) -> int | None:
        """Messages that wait for their row."""
        if self.end is None:
            return None
        return max(0, self.end - max(self.committed or 0, self.begin or 0))


class TopicOffsets:
    """Asks the broker for a topic's offsets; one connection, kept for as long as it works.

    Attributes:
        refused: why the broker did not let us in at the last `read`, if that was it.
    """

    def __init__(self, bootstrap_servers: str, topic: str, client: Mapping[str, Any] = OPEN) -> None:
        self.refused: str | None = None
        self._client = client
        self._servers = bootstrap_servers
        self._topic = topic
        self._consumer: KafkaConsumer | None = None

    def read(self) -> dict[int, tuple[int, int]] | None:
        """Partition → (first offset, one past the last); empty where there is no such topic, None without a broker."""
        from kafka import KafkaConsumer, TopicPartition
        from kafka.errors import AuthorizationError, KafkaError

        self.refused = None
        try:
            if self._consumer is None:
                self._consumer = connect(
                    KafkaConsumer,
                    bootstrap_servers=self._servers,
                    client_id="imagestream-lag",
                    bootstrap_timeout_ms=TIMEOUT_MS,
                    request_timeout_ms=TIMEOUT_MS,
                    allow_auto_create_topics=False,
                    metrics_enabled=False,
                    **self._client,
                )
            names = self._consumer.partitions_for_topic(self._topic) or ()
            partitions = [TopicPartition(self._topic, number) for number in sorted(names)]
            if not partitions:
                return {}
            begins = self._consumer.beginning_offsets(partitions, timeout_ms=TIMEOUT_MS)
            ends = self._consumer.end_offsets(partitions, timeout_ms=TIMEOUT_MS)
        except RefusedError as error:
            self.refused = str(error)
            return None
        except AuthorizationError:
            self.refused = no_right(self._topic, Right.READ, self._client)
            self.close()
            return None
        except (KafkaError, ValueError, OSError):
            self.close()
            return None
        return {one.partition: (begins[one], ends[one]) for one in partitions}

    def close(self) -> None:
        """Give the connection back; the next `read` opens another."""
        if self._consumer is not None:
            self._consumer.close(autocommit=False)
            self._consumer = None


def lags(committed: dict[int, int], offsets: dict[int, tuple[int, int]] | None) -> list[PartitionLag]:
    """Both sides of every partition that either side knows."""
    known = offsets or {}
    return [
        PartitionLag(
            partition,
            committed.get(partition),
            end=known[partition][1] if partition in known else None,
            begin=known[partition][0] if partition in known else None,
        )
        for partition in sorted({*committed, *known})
    ]
