"""Reconciliation of a micro-batch: every message of its offset ranges was read once and has one row.

Offsets have holes: transaction markers, messages of aborted transactions, and messages that compaction removed. So the
messages of a range are counted as they are read, by topic, partition and offset, independently of scoring:

    C1  every partition that was read is in the plan, and every offset is inside its range
    C2  offsets increase strictly within a run, and runs of one partition do not overlap: no message was read twice
    C3  holes = (end - start) - rows, which is not negative
    C4  for every partition, rows = predicted + quarantined: no message is lost after it was read
    C5  without holes, counting shows that a range is complete
    C6  with holes, Kafka's position shows it: a Spark task ends only when the consumer's position has reached the end
        of its range, and it skips a hole only if the start of the log, fetched after that read, is not beyond it
        (`KafkaDataConsumer` in Spark, with `failOnDataLoss`)
    C7  with holes, the start of the log is fetched again after the read, and recorded. A log start never decreases,
        so one that is not after the start of the range proves that nothing of the range had been deleted: the holes are
        markers, aborted messages or compacted messages. A later one proves nothing; it does not stop the stream either,
        since the messages may have been read before they were deleted.
    C8  the ids of the topics after the read are those of the start: no other topic was read under the same name

A batch that violates C1 to C4 or C8 is rejected before it is decided. While files are written, Kafka is asked for C8
and, if there are holes, for C7.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np
import pyarrow as pa

from streaming.errors import ConflictError, ServiceError
from streaming.pipeline.decisions import CountedRange, OffsetRange, TopicPartition
from streaming.wording import counted


@dataclass(frozen=True)
class OffsetRun:
    """Consecutive messages of one partition that a task read, at strictly increasing offsets."""

    topic: str
    partition: int
    rows: int
    first: int
    last: int


@dataclass
class ReadCounter:
    """Counts the messages that a task reads and quarantines."""

    runs: list[OffsetRun] = field(default_factory=list)
    quarantined: Counter[TopicPartition] = field(default_factory=Counter)

    def read(self, messages: pa.RecordBatch) -> None:
        """Count an Arrow batch with the columns `topic`, `partition` and `offset`."""
        if not messages.num_rows:
            return
        topics = messages.column("topic").dictionary_encode()
        topic, partition = topics.indices.to_numpy(), messages.column("partition").to_numpy()
        offset = messages.column("offset").to_numpy()
        ends_here = (np.diff(topic) != 0) | (np.diff(partition) != 0) | (np.diff(offset) <= 0)
        ends = [*(np.flatnonzero(ends_here) + 1).tolist(), len(offset)]
        for start, end in pairwise([0, *ends]):
            name = topics.dictionary[int(topic[start])].as_py()
            self._add(OffsetRun(name, int(partition[start]), end - start, int(offset[start]), int(offset[end - 1])))

    def _add(self, run: OffsetRun) -> None:
        before = self.runs[-1] if self.runs else None
        adjoins = before and (before.topic, before.partition) == (run.topic, run.partition)
        if before and adjoins and before.last < run.first:
            rows = before.rows + run.rows
            self.runs[-1] = replace(before, rows=rows, last=run.last)
        else:
            self.runs.append(run)

    def quarantine(self, messages: pa.RecordBatch, rows: Iterable[int]) -> None:
        """Count rows of an Arrow batch as quarantined."""
        topics, partitions = messages.column("topic"), messages.column("partition")
        self.quarantined.update((topics[row].as_py(), partitions[row].as_py()) for row in rows)


def reconcile(
    number: int,
    ranges: Sequence[OffsetRange],
    runs: Iterable[OffsetRun],
    predicted: Mapping[TopicPartition, int],
    quarantined: Mapping[TopicPartition, int],
) -> tuple[CountedRange, ...]:
    """The ranges of a batch with the number of messages read from each, after rules C1 to C4 were checked.

    Args:
        number: of the batch, for the error.
        ranges: as planned; topics by their names in the tables, as in all other arguments.
        runs: what all tasks read.
        predicted: rows per partition.
        quarantined: rows per partition.

    Raises:
        ServiceError: a rule is violated.
    """
    read: dict[TopicPartition, list[OffsetRun]] = {(one.topic, one.partition): [] for one in ranges}
    wrong: list[str] = []
    for run in runs:
        partition = run.topic, run.partition
        if partition in read:
            read[partition].append(run)
        else:
            wrong.append(f"{_named(partition)}: {counted(run.rows, 'message')} read, none planned")
    wrong += [
        f"{_named(partition)}: rows of messages that were not planned"
        for partition in {**predicted, **quarantined}
        if partition not in read
    ]
    found = []
    for one in ranges:
        partition = one.topic, one.partition
        of_partition = sorted(read[partition], key=lambda run: run.first)
        rows = sum(run.rows for run in of_partition)
        wrong += [f"{_named(partition)}: {problem}" for problem in _problems(one, of_partition, rows)]
        good, bad = predicted.get(partition, 0), quarantined.get(partition, 0)
        if rows != good + bad:
            wrong.append(
                f"{_named(partition)}: {counted(rows, 'message')} read of offsets {one.start} to {one.end - 1}, "
                f"{good} predicted + {bad} quarantined"
            )
        found.append(CountedRange(one.topic, one.partition, one.start, one.end, rows))
    if wrong:
        raise ServiceError(f"batch {number} does not add up: {wrong[0]}; none of it is committed")
    return tuple(found)


def _problems(planned: OffsetRange, runs: Sequence[OffsetRun], rows: int) -> Iterable[str]:
    if runs and (runs[0].first < planned.start or max(one.last for one in runs) >= planned.end):
        first, last = runs[0].first, max(one.last for one in runs)
        yield f"offsets {first} to {last} read, {planned.start} to {planned.end - 1} planned"
    for before, after in pairwise(runs):
        if after.first <= before.last:
            yield f"offsets {after.first} to {min(before.last, after.last)} read twice"
    if rows > planned.end - planned.start:
        yield f"{counted(rows, 'message')} read, {counted(planned.end - planned.start, 'offset')} planned"


def _named(partition: TopicPartition) -> str:
    return f"{partition[0]} partition {partition[1]}"


def partitions_with_holes(ranges: Iterable[CountedRange]) -> list[TopicPartition]:
    """The partitions from which fewer messages were read than there are offsets."""
    return [(one.topic, one.partition) for one in ranges if one.rows < one.end - one.start]


@dataclass(frozen=True)
class TopicSnapshot:
    """The state of the topics after a batch was read.

    Attributes:
        ids: topic in Kafka → topic id.
        log_starts: (topic in Kafka, partition) → the start of its log.
    """

    ids: Mapping[str, str]
    log_starts: Mapping[TopicPartition, int]


class WitnessError(Exception):
    """Kafka did not return the state of the topics; the batch is read again."""


def confirmed(
    number: int, ranges: Sequence[CountedRange], snapshot: TopicSnapshot, topics: Mapping[str, tuple[str, str]]
) -> tuple[CountedRange, ...]:
    """The ranges, with the log starts of those that have holes, after rules C7 and C8 were checked.

    Args:
        number: of the batch, for the error.
        ranges: as counted.
        snapshot: the state of the topics after the batch was read.
        topics: topic in the tables → (topic in Kafka, its id at the start).

    Raises:
        ServiceError: a topic was deleted and recreated while it was read.
        WitnessError: a topic does not exist at the moment.
    """
    for name, known in topics.values():
        found = snapshot.ids.get(name)
        if found is None:
            raise WitnessError(f"Kafka does not know topic {name!r} any more")
        if found != known:
            raise ConflictError(
                f"topic {name!r} was recreated while batch {number} was read (id {found}, before {known}); nothing of "
                "it is committed"
            )
    return tuple(
        replace(one, log_start=snapshot.log_starts.get((topics[one.topic][0], one.partition))) for one in ranges
    )
