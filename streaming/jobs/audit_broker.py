"""The audit against the broker: the offsets that have a row, and those where Kafka still holds a message, both ways.

It is the only proof that does not rest on the reader of the stream: another client reads the topic again, from the
start of its log, or of what the stream read, to where the tables end.

    missing    Kafka holds a message there, and no table has a row
    no message a table has a row, and the log, which reaches back so far, holds no message there: it was aborted, or of
               another topic. Compaction removes messages, so that this is not judged in a compacted topic.

Offsets are compared in windows; messages are read in bounded memory, whatever they unpack to, and dropped.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streaming.errors import UnavailableError
from streaming.jobs.audit import SPANS, AuditReport, AuditTables, Compared, Kind, Span
from streaming.pipeline.offsets import COMMITTED
from streaming.pipeline.positions import Positions, name_in_kafka
from streaming.platform.bounded_reader import BoundedReader
from streaming.platform.kafka_client import connect
from streaming.platform.kafka_security import client_arguments
from streaming.platform.topic import TIMEOUT_MS, topic_configuration
from streaming.query import open_snapshot
from streaming.settings import Settings

WINDOW_OFFSETS = 1_000_000

IDS = """
SELECT DISTINCT entry.key AS topic, entry."value" AS id
FROM (SELECT unnest(map_entries(topics)) AS entry FROM batches WHERE topics IS NOT NULL)
"""
ROWS = """
SELECT DISTINCT "offset" FROM row
WHERE topic = $topic AND "partition" = $partition AND "offset" >= $start AND "offset" < $end ORDER BY "offset"
"""
Offsets = NDArray[np.int64]


def compare_with_broker(settings: Settings, bootstrap_servers: str, report: AuditReport) -> None:
    """Compare all that the batches have read with what Kafka holds, and add what is found to the report.

    Raises:
        ServiceError: the broker does not answer, or a table cannot be read.
    """
    from kafka.admin import KafkaAdminClient
    from kafka.errors import KafkaError

    client = client_arguments(settings)
    timeouts = {"request_timeout_ms": TIMEOUT_MS, "bootstrap_timeout_ms": TIMEOUT_MS}
    try:
        with (
            open_snapshot(settings) as snapshot,
            closing(connect(KafkaAdminClient, bootstrap_servers=bootstrap_servers, **timeouts, **client)) as admin,
            closing(BoundedReader(bootstrap_servers, client, committed=settings.isolation == COMMITTED)) as reader,
        ):
            tables = AuditTables(snapshot)
            spans = [Span(**row) for row in tables.rows(SPANS)]
            ids = _recorded_ids(tables)
            topics = {name: _Topic(admin, name) for name in sorted({name_in_kafka(span.topic) for span in spans})}
            for span in spans:
                topic = topics[name_in_kafka(span.topic)]
                note = topic.why_not(span, ids.get(span.topic), [one.topic for one in spans])
                if note:
                    report.compared.append(Compared(span.topic, span.partition, note=note))
                else:
                    _compare(tables, reader, topic, span, report)
    except KafkaError as error:
        raise UnavailableError(f"the topic cannot be read from the broker at {bootstrap_servers}: {error}") from error


class _Topic:
    """A topic as it is in Kafka now."""

    def __init__(self, admin: Any, name: str) -> None:
        (described,) = admin.describe_topics([name])
        self.name = name
        self.id = str(described["topic_id"]) if not described["error_code"] else None
        self.partitions = {one["partition_index"] for one in described["partitions"]}
        policy = topic_configuration(admin, name).get("cleanup.policy") if self.id else None
        self.compacted = None if policy is None else "compact" in policy  # None: not known

    def why_not(self, span: Span, recorded: str | None, names: Sequence[str]) -> str:
        """Why a partition cannot be compared; empty if it can."""
        if self.id is None or span.partition not in self.partitions:
            return "it is not in Kafka any more"
        newest = Positions(topics=dict.fromkeys(names, "")).topic(self.name)
        if (recorded and recorded != self.id) or span.topic != newest:
            return "the topic was made again since"
        return ""


def _recorded_ids(tables: AuditTables) -> Mapping[str, str]:
    with tables.query("SELECT * FROM batches LIMIT 0") as reader:
        if "topics" not in reader.schema.names:  # a table that is older than the column
            return {}
    return {row["topic"]: row["id"] for row in tables.rows(IDS)}


def _compare(tables: AuditTables, reader: BoundedReader, topic: _Topic, span: Span, report: AuditReport) -> None:
    end = span.last + 1
    start = max(span.first, reader.log_start(topic.name, span.partition))
    if start >= end:
        report.compared.append(Compared(span.topic, span.partition, note="Kafka holds nothing of it any more"))
        return
    note = "" if topic.compacted is False else "compacted: rows without a message are not judged"
    note = "its cleanup policy is not known: rows without a message are not judged" if topic.compacted is None else note
    held_in_all = rows_in_all = 0
    for first in range(start, end, WINDOW_OFFSETS):
        after = min(first + WINDOW_OFFSETS, end)
        held = np.array([one.offset for one in reader.read(topic.name, span.partition, first, after)], np.int64)
        where = {"topic": span.topic, "partition": span.partition, "start": first, "end": after}
        rows = np.array([row["offset"] for row in tables.rows(ROWS, where)], np.int64)
        held_in_all, rows_in_all = held_in_all + len(held), rows_in_all + len(rows)
        for low, high in _runs(np.setdiff1d(held, rows)):
            text = f"{span.topic} partition {span.partition}: Kafka holds offsets {low} to {high}, which have no row"
            report.add(Kind.GAP, text, topic=span.topic, partition=span.partition, **{"from": low, "to": high})
        if topic.compacted is not False:
            continue
        begin = reader.log_start(topic.name, span.partition)  # now: what was deleted meanwhile is not judged
        strange = np.setdiff1d(rows, held)
        for low, high in _runs(strange[strange >= begin]):
            text = (
                f"{span.topic} partition {span.partition}: rows for offsets {low} to {high}, where Kafka has no message"
            )
            report.add(Kind.NOT_IN_KAFKA, text, topic=span.topic, partition=span.partition, **{"from": low, "to": high})
    report.compared.append(Compared(span.topic, span.partition, start, span.last, held_in_all, rows_in_all, note))


def _runs(offsets: Offsets) -> Iterator[tuple[int, int]]:
    """Neighbours as one run: its first and its last offset."""
    if len(offsets):
        for run in np.split(offsets, np.flatnonzero(np.diff(offsets) > 1) + 1):
            yield int(run[0]), int(run[-1])
