"""The audit against the broker: compares the offsets that have a row with the messages that Kafka still has.

It is the only check that does not rely on the stream's own reader: another client reads the topic again, from the start
of its log, or of the first batch, to where the tables end.

    missing    Kafka has a message, but no table has a row
    no message a table has a row, but the log, which covers the offset, has no message: it was aborted, or belongs to
               another topic. Compaction removes messages, so this is not checked in a compacted topic.

Offsets are compared in windows. Messages are read in bounded memory, regardless of their decompressed size.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streaming.errors import UnavailableError
from streaming.jobs.audit import SPANS, AuditReport, AuditTables, Compared, ProblemKind, Span
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
    """Compare all batches with the messages in Kafka, and add the result to the report.

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
                note = topic.mismatch(span, ids.get(span.topic), [one.topic for one in spans])
                if note:
                    report.compared.append(Compared(span.topic, span.partition, note=note))
                else:
                    _compare(tables, reader, topic, span, report)
    except KafkaError as error:
        raise UnavailableError(f"the topic cannot be read from the broker at {bootstrap_servers}: {error}") from error


class _Topic:
    """The current state of a topic in Kafka."""

    def __init__(self, admin: Any, name: str) -> None:
        (described,) = admin.describe_topics([name])
        self.name = name
        self.id = str(described["topic_id"]) if not described["error_code"] else None
        self.partitions = {one["partition_index"] for one in described["partitions"]}
        policy = topic_configuration(admin, name).get("cleanup.policy") if self.id else None
        self.compacted = None if policy is None else "compact" in policy  # None: not known

    def mismatch(self, span: Span, recorded: str | None, names: Sequence[str]) -> str:
        """Why a partition cannot be compared; empty if it can."""
        if self.id is None or span.partition not in self.partitions:
            return "it is no longer in Kafka"
        newest = Positions(topics=dict.fromkeys(names, "")).topic(self.name)
        if (recorded and recorded != self.id) or span.topic != newest:
            return "the topic was deleted and recreated"
        return ""


def _recorded_ids(tables: AuditTables) -> Mapping[str, str]:
    with tables.query("SELECT * FROM batches LIMIT 0") as reader:
        if "topics" not in reader.schema.names:  # a table of an earlier release
            return {}
    return {row["topic"]: row["id"] for row in tables.rows(IDS)}


def _compare(tables: AuditTables, reader: BoundedReader, topic: _Topic, span: Span, report: AuditReport) -> None:
    end = span.last + 1
    start = max(span.first, reader.log_start(topic.name, span.partition))
    if start >= end:
        report.compared.append(Compared(span.topic, span.partition, note="Kafka no longer has any of it"))
        return
    note = "" if topic.compacted is False else "compacted: rows without a message are not checked"
    note = "its cleanup policy is unknown: rows without a message are not checked" if topic.compacted is None else note
    held_in_all = rows_in_all = 0
    for first in range(start, end, WINDOW_OFFSETS):
        after = min(first + WINDOW_OFFSETS, end)
        held = np.array([one.offset for one in reader.read(topic.name, span.partition, first, after)], np.int64)
        where = {"topic": span.topic, "partition": span.partition, "start": first, "end": after}
        rows = np.array([row["offset"] for row in tables.rows(ROWS, where)], np.int64)
        held_in_all, rows_in_all = held_in_all + len(held), rows_in_all + len(rows)
        for low, high in _runs(np.setdiff1d(held, rows)):
            text = f"{span.topic} partition {span.partition}: Kafka has offsets {low} to {high}, which have no row"
            report.add(ProblemKind.GAP, text, topic=span.topic, partition=span.partition, **{"from": low, "to": high})
        if topic.compacted is not False:
            continue
        begin = reader.log_start(topic.name, span.partition)  # fetched again, since retention may have deleted some
        strange = np.setdiff1d(rows, held)
        for low, high in _runs(strange[strange >= begin]):
            text = (
                f"{span.topic} partition {span.partition}: rows for offsets {low} to {high}, where Kafka has no message"
            )
            report.add(
                ProblemKind.NOT_IN_KAFKA, text, topic=span.topic, partition=span.partition, **{"from": low, "to": high}
            )
    report.compared.append(Compared(span.topic, span.partition, start, span.last, held_in_all, rows_in_all, note))


def _runs(offsets: Offsets) -> Iterator[tuple[int, int]]:
    """The first and last offset of each run of consecutive offsets."""
    if len(offsets):
        for run in np.split(offsets, np.flatnonzero(np.diff(offsets) > 1) + 1):
            yield int(run[0]), int(run[-1])
