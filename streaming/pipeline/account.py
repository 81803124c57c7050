"""Accounting of a micro-batch: every message that its offset ranges hold was read once and has one row.

Offsets have holes: markers of transactions, messages of aborted ones, and what compaction removed. So the messages of a
range are counted where they are read, by topic, partition and offset, apart from what is scored:

    C1  every place that was read is in the plan, and every offset is inside its range
    C2  offsets rise strictly within a piece, and pieces of one partition do not overlap: no message was read twice
    C3  holes = (end - start) - rows, which is not negative
    C4  for every place, rows = predicted + quarantined: nothing is lost after it was read
    C5  without holes, a range is complete by counting
    C6  with holes, it is complete by Kafka's position: a task of Spark ends only when the consumer's position has
        reached the end of its range, and it passes a hole only if the start of the log, asked after that read, is not
        beyond it (`KafkaDataConsumer` in Spark, with `failOnDataLoss`)
    C7  with holes, the start of the log is asked once more after the read, and recorded. A log start never falls, so
        one that is not after the start of the range proves that nothing of the range had been deleted: the holes are
        markers, aborted or compacted messages. A later one proves nothing; it does not stop the stream either, since
        the messages may have been read before they were deleted.
    C8  the ids of the topics after the read are those of the start: no other topic was read under the same name

C1 to C4 and C8 refuse a batch before anything of it is decided. Kafka is asked for C7, only where there are holes, and
C8 while files are written.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np
import pyarrow as pa

from streaming.errors import ConflictError, ServiceError
from streaming.pipeline.decisions import CountedRange, OffsetRange

Place = tuple[str, int]  # topic, partition


@dataclass(frozen=True)
class Piece:
    """Messages of one partition that a task read one after the other, at strictly rising offsets."""

    topic: str
    partition: int
    rows: int
    first: int
    last: int


@dataclass
class ReadCounter:
    """Counts the messages that a task reads, and those of them that it quarantines."""

    pieces: list[Piece] = field(default_factory=list)
    quarantined: Counter[Place] = field(default_factory=Counter)

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
            self._add(Piece(name, int(partition[start]), end - start, int(offset[start]), int(offset[end - 1])))

    def _add(self, piece: Piece) -> None:
        before = self.pieces[-1] if self.pieces else None
        adjoins = before and (before.topic, before.partition) == (piece.topic, piece.partition)
        if before and adjoins and before.last < piece.first:
            rows = before.rows + piece.rows
            self.pieces[-1] = replace(before, rows=rows, last=piece.last)
        else:
            self.pieces.append(piece)

    def quarantine(self, messages: pa.RecordBatch, rows: Iterable[int]) -> None:
        """Count rows of an Arrow batch as quarantined."""
        topics, partitions = messages.column("topic"), messages.column("partition")
        self.quarantined.update((topics[row].as_py(), partitions[row].as_py()) for row in rows)


def account(
    number: int,
    ranges: Sequence[OffsetRange],
    pieces: Iterable[Piece],
    predicted: Mapping[Place, int],
    quarantined: Mapping[Place, int],
) -> tuple[CountedRange, ...]:
    """The ranges of a batch with the number of messages read from each: rules C1 to C4.

    Args:
        number: of the batch, for the error.
        pieces: what all tasks read; topics by their names in the tables, as in all other arguments.
        predicted: place → rows that were predicted.
        quarantined: place → rows that were quarantined.

    Raises:
        ServiceError: the batch does not add up.
    """
    read: dict[Place, list[Piece]] = {(one.topic, one.partition): [] for one in ranges}
    wrong: list[str] = []
    for piece in pieces:
        place = piece.topic, piece.partition
        if place in read:
            read[place].append(piece)
        else:
            wrong.append(f"{_named(place)}: {piece.rows} messages read, none planned")
    wrong += [
        f"{_named(place)}: rows of messages that were not planned"
        for place in {**predicted, **quarantined}
        if place not in read
    ]
    counted = []
    for one in ranges:
        place = one.topic, one.partition
        of_place = sorted(read[place], key=lambda piece: piece.first)
        rows = sum(piece.rows for piece in of_place)
        wrong += [f"{_named(place)}: {problem}" for problem in _problems(one, of_place, rows)]
        good, bad = predicted.get(place, 0), quarantined.get(place, 0)
        if rows != good + bad:
            wrong.append(
                f"{_named(place)}: {rows} messages read of offsets {one.start} to {one.end - 1}, "
                f"{good} predicted + {bad} quarantined"
            )
        counted.append(CountedRange(one.topic, one.partition, one.start, one.end, rows))
    if wrong:
        raise ServiceError(f"batch {number} does not add up: {wrong[0]}; nothing of it is committed")
    return tuple(counted)


def _problems(planned: OffsetRange, pieces: Sequence[Piece], rows: int) -> Iterable[str]:
    if pieces and (pieces[0].first < planned.start or max(one.last for one in pieces) >= planned.end):
        first, last = pieces[0].first, max(one.last for one in pieces)
        yield f"offsets {first} to {last} read, {planned.start} to {planned.end - 1} planned"
    for before, after in pairwise(pieces):
        if after.first <= before.last:
            yield f"offsets {after.first} to {min(before.last, after.last)} read twice"
    if rows > planned.end - planned.start:
        yield f"{rows} messages read, {planned.end - planned.start} offsets planned"


def _named(place: Place) -> str:
    return f"{place[0]} partition {place[1]}"


def places_with_holes(ranges: Iterable[CountedRange]) -> list[Place]:
    """The places of which fewer messages were read than there are offsets."""
    return [(one.topic, one.partition) for one in ranges if one.rows < one.end - one.start]


@dataclass(frozen=True)
class Seen:
    """What Kafka said after a batch had been read.

    Attributes:
        ids: topic in Kafka → its id.
        log_starts: place → the first offset that its log still had.
    """

    ids: Mapping[str, str]
    log_starts: Mapping[Place, int]


class WitnessError(Exception):
    """Kafka did not say what a batch has to be compared with: the batch is read again."""


def confirmed(
    number: int, ranges: Sequence[CountedRange], seen: Seen, topics: Mapping[str, tuple[str, str]]
) -> tuple[CountedRange, ...]:
    """The ranges with the log starts of those that have holes: rules C7 and C8.

    Args:
        topics: name in the tables → (name in Kafka, the id that the topic had at the start).

    Raises:
        ServiceError: a topic was deleted and made again while it was read.
        WitnessError: a topic is not there just now.
    """
    for name, known in topics.values():
        found = seen.ids.get(name)
        if found is None:
            raise WitnessError(f"Kafka does not know topic {name!r} any more")
        if found != known:
            raise ConflictError(
                f"topic {name!r} was made again while batch {number} was read (id {found}, before {known}); nothing of "
                "it is committed"
            )
    return tuple(replace(one, log_start=seen.log_starts.get((topics[one.topic][0], one.partition))) for one in ranges)
