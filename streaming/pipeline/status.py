"""The status of the service from the outside: tables, registry, broker, and the stream's state object.

The service is healthy if the broker answers, a stream of the topic is running with a recent heartbeat (a micro-batch,
or a poll without messages), and the stream accepts the champion. Lag alone does not make it unhealthy.
"""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from models.errors import ModelError
from streaming.errors import ServiceError
from streaming.pipeline.decisions import TopicPartition
from streaming.pipeline.observe import STALE_AFTER_S, StreamState, read_state
from streaming.pipeline.offsets import OffsetsByPartition, PartitionLag, TopicOffsets, lags
from streaming.pipeline.positions import committed_ends, name_in_kafka
from streaming.platform.broker import bootstrap_servers as home_servers
from streaming.platform.kafka_security import client_arguments
from streaming.platform.topic import TopicOperation, is_hidden, messages_near_retention, permission_error
from streaming.query import query
from streaming.registry import CHALLENGER, CHAMPION, open_registry
from streaming.settings import Settings

BATCHES_FOR_RATE = 10

LAST_BATCHES = """
SELECT query_id, batch_id, model_version, input_rows, predicted_rows, quarantined_rows, input_bytes,
       element_at(seconds, 'batch')[1] AS seconds, refused, epoch(committed_at) AS committed
FROM batches WHERE len(list_filter(offsets, lambda o: list_contains($topics, o.topic))) > 0
ORDER BY committed DESC LIMIT $limit
"""
QUARANTINED = """
SELECT reason, count(*) AS n FROM quarantine WHERE list_contains($topics, topic) GROUP BY reason ORDER BY n DESC, reason
"""


@dataclass(frozen=True)
class LastBatch:
    """The newest micro-batch of the topic."""

    query_id: str
    batch_id: int
    model_version: int
    input_rows: int
    committed_at: datetime
    age_s: float


@dataclass(frozen=True)
class Status:
    """The output of `imagestream status`; None means not known."""

    topic: str
    healthy: bool
    reasons: list[str]  # why it is not healthy
    broker: str | None  # its address
    broker_up: bool
    partitions: list[PartitionLag]
    stream: StreamState | None  # the last process that streamed the topic
    streaming: bool  # whether that process is still streaming
    images_per_second: float | None  # during the last `BATCHES_FOR_RATE` batches
    last_batch: LastBatch | None
    aliases: dict[str, int | None]
    challenger_error: str | None  # why the challenger was refused, or failed, in the last batch
    quarantined: dict[str, int]
    near_retention: dict[str, int]  # topic → messages without a row that are past half of Kafka's retention time

    @property
    def lag(self) -> int | None:
        """The number of messages without a row; None if the broker does not answer."""
        return sum(one.lag or 0 for one in self.partitions) if self.broker_up else None

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        partitions = [asdict(one) | {"lag": one.lag} for one in self.partitions]
        return asdict(self) | {"lag": self.lag, "partitions": partitions}


def read_status(settings: Settings, *, stale_after_s: float = STALE_AFTER_S) -> Status:
    """Collect the status once. Anything that is unavailable is left out and named in the reasons.

    Raises:
        ServiceError: a table cannot be read.
    """
    reasons = []
    by_topic = committed_ends(settings)
    committed = {partition: end for ends in by_topic.values() for partition, end in ends.items()}
    topics = list(by_topic)
    names = [name_in_kafka(topic) for topic in topics]
    broker, offsets, refused = _broker(settings, names)
    if offsets is None:
        silent = f"the broker at {broker} does not answer" if broker else "the home's broker is not running"
        reasons.append(refused or silent)
    state = read_state(settings)
    streaming, why = (False, "no stream has run on this topic here") if state is None else state.health(stale_after_s)
    if not streaming:
        reasons.append(why)
    aliases, problem = _aliases(settings)
    if problem:
        reasons.append(problem)
    batches = _rows(settings, "batches", LAST_BATCHES, topics=topics, limit=BATCHES_FOR_RATE)
    refused = batches[0]["refused"] if batches else None
    if refusal(refused, aliases.get(CHAMPION)):
        reasons.append(f"the champion was rejected, and an older model is in use: {refused}")
    busy_s = sum(row["seconds"] or 0 for row in batches)
    return Status(
        topic=settings.topic,
        healthy=not reasons,
        reasons=reasons,
        broker=broker,
        broker_up=offsets is not None,
        partitions=lags(committed, offsets),
        stream=state,
        streaming=state is not None and state.alive,
        images_per_second=sum(row["input_rows"] for row in batches) / busy_s if busy_s else None,
        last_batch=_last(batches[0]) if batches else None,
        aliases=aliases,
        challenger_error=refusal(refused, aliases.get(CHALLENGER)),
        near_retention=_near_retention(settings, broker if offsets else None, committed, names),
        quarantined={row["reason"]: row["n"] for row in _rows(settings, "quarantine", QUARANTINED, topics=topics)},
    )


def refusal(refused: str | None, version: int | None) -> str | None:
    """Why a version was refused or failed, from the column `refused` of a row of `batches`; None if it was not."""
    found = re.search(rf"(?:^|; )version {version}: (.*?)(?=; version \d+: |$)", refused or "")
    return found[1] if found else None


def last_refusal(settings: Settings, version: int) -> str | None:
    """Why the newest micro-batch of the home, of any stream, was scored without a version that an alias points to.

    Raises:
        ServiceError: the table cannot be read.
    """
    rows = _rows(settings, "batches", "SELECT refused FROM batches ORDER BY committed_at DESC LIMIT 1")
    return refusal(rows[0]["refused"], version) if rows else None


def _broker(settings: Settings, topics: Sequence[str]) -> tuple[str | None, OffsetsByPartition | None, str | None]:
    """The broker's address, the offsets, and why it denies access; None if it is not running, or does not answer."""
    client = client_arguments(settings)
    try:
        servers = home_servers(settings)
    except ServiceError:
        return None, None, None
    offsets = TopicOffsets(servers, topics, client, settings.isolation)
    try:
        found = offsets.read()
        if found == {} and client and is_hidden(servers, topics[0], client):
            return servers, None, permission_error(topics[0], TopicOperation.READ, client)
        return servers, found, offsets.refused
    finally:
        offsets.close()


def _near_retention(
    settings: Settings, servers: str | None, committed: Mapping[TopicPartition, int], names: Sequence[str]
) -> dict[str, int]:
    if servers is None:
        return {}
    with suppress(ServiceError):  # the broker has stopped since the previous request
        return messages_near_retention(servers, names, committed, client_arguments(settings))
    return {}


def _aliases(settings: Settings) -> tuple[dict[str, int | None], str | None]:
    """Alias → version, and the problem with the aliases, if any."""
    registry = open_registry(settings.home)
    try:
        aliases = {str(alias): target for alias, target in registry.targets().items()}
    except (ModelError, ServiceError) as error:
        return {}, str(error)
    return aliases, None if aliases[CHAMPION] else f"there is no champion model in {registry.place}"


def _rows(settings: Settings, table: str, sql: str, **parameters: Any) -> list[dict[str, Any]]:
    if not settings.place.has_table(table):
        return []
    rows: list[dict[str, Any]] = query(settings, sql, parameters=parameters).to_pylist()
    return rows


def _last(row: dict[str, Any]) -> LastBatch:
    at = datetime.fromtimestamp(row["committed"], UTC)
    named = {name: row[name] for name in ("query_id", "batch_id", "model_version", "input_rows")}
    return LastBatch(**named, committed_at=at, age_s=(datetime.now(UTC) - at).total_seconds())
