"""The positions of a stream, and where its next micro-batch must begin, so that no offset is skipped or repeated.

The table `batches` is the authority on what was scored; `streams/NAME/stream.json`, created once, says where the stream
began. Each start compares both with Kafka. If the topic was deleted and recreated, or retention has removed offsets,
the stream stops with an error that names the partition and the offsets, before a message is scored twice or skipped.

An offset identifies a message only within one topic. If a topic is deleted and recreated under the same name, its
offsets start from 0, so the tables distinguish the topics by a number: `images`, `images~2`. Kafka allows no `~` in a
name.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cache, partial, reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pyarrow as pa
import pyarrow.compute as pc
from deltalake.exceptions import DeltaError

from streaming.errors import ConflictError, DamagedError, NotFoundError, ServiceError
from streaming.pipeline.decisions import Decision, OffsetRange, TopicPartition, parse_object
from streaming.platform.topic import Topic
from streaming.settings import Settings
from streaming.storage.files import STRICT, read_as
from streaming.storage.table_files import local_copies
from streaming.storage.table_log import open_delta
from streaming.storage.tables import BATCHES, data_files
from streaming.wording import counted

if TYPE_CHECKING:
    from pydantic import TypeAdapter

SEPARATOR = "~"
FORMAT = 1
READ = ("query_id", "batch_id", "offsets", "topics")  # the columns of `batches` that are read
FILES_AT_A_TIME = 4


def name_in_tables(topic: str, number: int) -> str:
    """The value of the column `topic` for the `number`th topic of this name."""
    return topic if number == 1 else f"{topic}{SEPARATOR}{number}"


def name_in_kafka(recorded: str) -> str:
    """The name in Kafka of a topic that the column `topic` names."""
    return recorded.split(SEPARATOR, maxsplit=1)[0]


def number_of(recorded: str) -> int:
    """The number of a topic that the column `topic` names: 1 for the first of its name."""
    number = recorded.partition(SEPARATOR)[2]
    return int(number) if number.isdecimal() else 1


@dataclass(frozen=True)
class FirstOffset:
    """Where a stream began to read a partition."""

    topic: str  # its name in the tables
    partition: int
    offset: int

    __pydantic_config__: ClassVar = STRICT


@dataclass(frozen=True)
class StreamIdentity:
    """`streams/NAME/stream.json`, created once.

    Attributes:
        id: random; the `query_id` of its rows, and the application id of its transactions.
        topic: the topics in Kafka, or the pattern, that it read at its first start.
        topics: topic in the tables → topic id in Kafka, empty if not known.
        first: where it began; partitions that are not listed are read from offset 0.
    """

    id: str
    topic: str
    topics: dict[str, str]
    first: tuple[FirstOffset, ...]

    __pydantic_config__: ClassVar = STRICT

    def to_json(self) -> bytes:
        return json.dumps({"format": FORMAT, **asdict(self)}).encode()


@cache
def _identity_type() -> "TypeAdapter[Any]":
    from pydantic import TypeAdapter

    return TypeAdapter(StreamIdentity)


def identity_key(stream: str) -> str:
    """The key of a stream's identity in the home's store."""
    return f"streams/{stream}/stream.json"


def read_identity(settings: Settings, stream: str) -> StreamIdentity | None:
    """The identity of a stream; None before its first start.

    Raises:
        ServiceError: the object is damaged.
    """
    store, key = settings.place.store, identity_key(stream)
    data = store.get(key)
    if data is None:
        return None
    name = f"{store.place}/{key}"
    identity: StreamIdentity = parse_object(data, name, "stream", (FORMAT,), _identity_type())
    if not identity.id.replace("-", "").isalnum() or any(min(one.partition, one.offset) < 0 for one in identity.first):
        raise DamagedError(f"the stream {name} is damaged: bad id or first offsets; restore it from a copy")
    return identity


@dataclass(frozen=True)
class Positions:
    """The positions of a stream.

    Attributes:
        stream: its id; None before its first start.
        number: of its newest complete batch, 0 before the first.
        ends: per partition, one past the last offset read, or the first offset to read if there is none.
        topics: as in `StreamIdentity`.
    """

    stream: str | None = None
    number: int = 0
    ends: Mapping[TopicPartition, int] = field(default_factory=dict)
    topics: Mapping[str, str] = field(default_factory=dict)

    def after(self, decision: Decision) -> "Positions":
        """The positions once a decided batch is complete."""
        ends = {(one.topic, one.partition): one.end for one in decision.ranges}
        return Positions(self.stream, decision.number, {**self.ends, **ends}, {**self.topics, **decision.topics})

    def topic(self, name: str) -> str:
        """The name in the tables of the newest topic that has this name in Kafka."""
        known = [*self.topics, *(topic for topic, _ in self.ends)]
        return name_in_tables(name, max((number_of(one) for one in known if name_in_kafka(one) == name), default=1))

    def of_topic(self, topic: str) -> dict[int, int]:
        """Partition → end, for a topic by its name in the tables."""
        return {partition: end for (one, partition), end in self.ends.items() if one == topic}


def read_positions(settings: Settings, identity: StreamIdentity) -> Positions:
    """The positions after the complete batches of a stream, read from one version of the table `batches`.

    Raises:
        ServiceError: the table cannot be read.
    """
    first = {(one.topic, one.partition): one.offset for one in identity.first}
    batches = _read_batches(settings)
    mine = batches.filter(pc.equal(batches.column("query_id"), identity.id))
    if not mine.num_rows:
        return Positions(identity.id, 0, first, identity.topics)
    newest = mine.take(pc.sort_indices(mine.column("batch_id"), [("", "descending")])[:1]).to_pylist()[0]
    topics = {**identity.topics, **dict(newest["topics"] or ())}
    return Positions(identity.id, newest["batch_id"], {**first, **_ends(mine)}, topics)


def ends_of_all(settings: Settings) -> dict[TopicPartition, int]:
    """One past the last offset of each partition that any stream has read, from the tables alone."""
    return _ends(_read_batches(settings))


def _ends(batches: pa.Table) -> dict[TopicPartition, int]:
    ranges = pc.list_flatten(batches.column("offsets"))
    columns = {name: pc.struct_field(ranges, name) for name in ("topic", "partition", "end")}
    ends = pa.table(columns).group_by(["topic", "partition"]).aggregate([("end", "max")])
    return {(row["topic"], row["partition"]): row["end_max"] for row in ends.to_pylist()}


def _read_batches(settings: Settings) -> pa.Table:
    """The columns `READ` of one version of `batches`; no rows if the table does not exist.

    Files in a bucket are read from local copies: they never change, so only new ones are fetched. deltalake's own
    queries would block all other threads of the process while they wait for the bucket, and DuckDB prints an error when
    a process with a JVM exits.
    """
    schema = pa.schema([BATCHES.field(name) for name in READ])
    home = settings.place
    if not home.has_table("batches"):
        return schema.empty_table()
    place = home.table("batches")
    try:
        files = local_copies(home, data_files(open_delta(place), place))
        with ThreadPoolExecutor(FILES_AT_A_TIME) as pool:
            return pa.concat_tables([schema.empty_table(), *pool.map(partial(_read_file, schema), files)])
    except (DeltaError, OSError, pa.ArrowException) as error:
        raise DamagedError(f"table batches in {home.tables} cannot be read: {str(error).splitlines()[0]}") from error


def _read_file(schema: pa.Schema, file: str) -> pa.Table:
    """A file's columns; not by pyarrow's datasets, which import pandas and take twice the time for small files."""
    return pa.Table.from_batches(read_as(Path(file), schema), schema)


def committed_offsets(settings: Settings) -> tuple[str, dict[int, int]]:
    """The name of the settings' topic in the tables, and partition → one past its last message in a complete batch.

    Raises:
        ServiceError: the table cannot be read, or the stream's identity is damaged.
    """
    positions = _stream_positions(settings)
    topic = positions.topic(settings.topic)
    return topic, positions.of_topic(topic)


def committed_ends(settings: Settings) -> dict[str, dict[TopicPartition, int]]:
    """Topic in the tables → (topic in Kafka, partition) → one past its last message in a complete batch."""
    positions = _stream_positions(settings)
    names = {name_in_kafka(one) for one in positions.topics} or {settings.topic}
    topics = {positions.topic(name): name for name in sorted(names)}
    return {
        topic: {(name, partition): end for partition, end in positions.of_topic(topic).items()}
        for topic, name in topics.items()
    }


def _stream_positions(settings: Settings) -> Positions:
    identity = read_identity(settings, settings.topic)
    return Positions(ends=ends_of_all(settings)) if identity is None else read_positions(settings, identity)


def check_not_shared(settings: Settings, topics: Collection[str]) -> None:
    """Reject topics (names in Kafka) that another stream of the home reads: their messages would have two rows.

    Raises:
        ServiceError: another stream reads one of them; the error names it.
    """
    for other in settings.place.store.folders("streams"):
        identity = None if other == settings.topic else read_identity(settings, other)
        if identity is not None:
            theirs = {name_in_kafka(one) for one in read_positions(settings, identity).topics}
            if shared := sorted(theirs.intersection(topics)):
                raise ConflictError(
                    f"topic {shared[0]!r} is read by stream {other!r} of {settings.home}, and its messages would have "
                    "two rows: leave it to that stream, or use another home"
                )


@dataclass(frozen=True)
class Accept:
    """What the user has agreed to."""

    loss: bool = False  # skip offsets that Kafka no longer has
    new_topic: bool = False  # read a topic that was deleted and recreated under the same name


class TopicAppearedError(Exception):
    """Spark planned messages of a topic that did not exist when the query was planned."""


class OffsetPlan:
    """Where each partition's next micro-batch must begin, updated after every batch.

    Attributes:
        stream: the stream's id.
        number: of the newest batch.
        topics: name in the tables → the topic's id in Kafka.
    """

    def __init__(self, stream: str, number: int, name: str, ends: Mapping[int, int], topic: Topic) -> None:
        self.stream = stream
        self.number = number
        self.topics = {name: topic.id}
        self._in_kafka = {name: topic.name}
        self._ends = {(name, one): end for one, end in ends.items()}
        self._starts = {(name, one): max(ends.get(one, 0), begin) for one, begin in topic.begins.items()}

    @property
    def starts(self) -> dict[TopicPartition, int]:
        """Per partition, the first offset of the next micro-batch; topics by their names in the tables."""
        return dict(self._starts)

    def join(self, other: "OffsetPlan") -> "OffsetPlan":
        """Add the plan of another topic of the same stream."""
        self.topics |= other.topics
        self._in_kafka |= other._in_kafka
        self._ends |= other._ends
        self._starts |= other._starts
        return self

    def starting_offsets(self) -> str:
        """Spark's `startingOffsets`: one past the last scored message, or the first message that Kafka still has."""
        starts: dict[str, dict[str, int]] = {name: {} for name in self._in_kafka.values()}
        for (name, partition), start in sorted(self._starts.items()):
            starts[self._in_kafka[name]][str(partition)] = start
        return json.dumps(starts)

    @property
    def names(self) -> dict[str, str]:
        """Name in Kafka → name in the tables."""
        return {in_kafka: name for name, in_kafka in self._in_kafka.items()}

    @property
    def kafka_topics(self) -> dict[str, tuple[str, str]]:
        """Name in the tables → (name in Kafka, id)."""
        return {name: (self._in_kafka[name], known) for name, known in self.topics.items()}

    def check(self, ranges: Sequence[OffsetRange]) -> list[OffsetRange]:
        """Reject a micro-batch that does not begin where it must; return the ranges skipped with the user's consent.

        Raises:
            TopicAppearedError: it has messages of a topic that is not in the plan.
            ServiceError: it begins at another offset.
        """
        left_out = []
        for one in ranges:
            if one.topic not in self.topics:
                raise TopicAppearedError(f"topic {one.topic!r} appeared")
            place = one.topic, one.partition
            start = self._starts.get(place, 0)  # a partition added since the query began
            if one.start != start:
                raise ServiceError(
                    f"topic {one.topic!r} partition {one.partition}: the next batch must begin at offset {start}, but "
                    f"Spark planned one from {one.start}; none of it is committed"
                )
            if (end := self._ends.get(place, 0)) < start:
                left_out.append(OffsetRange(*place, end, start))
        return left_out

    def advance(self, ranges: Sequence[OffsetRange]) -> None:
        """Record a complete batch."""
        self.number += 1
        for one in ranges:
            place = one.topic, one.partition
            self._ends[place] = self._starts[place] = one.end


def plan_topics(positions: Positions, topics: Sequence[Topic], accept: Accept) -> OffsetPlan:
    """The plan of all topics of a stream; raises the errors of `plan_start`."""
    return reduce(OffsetPlan.join, [plan_start(positions, topic, accept) for topic in topics])


def plan_start(positions: Positions, topic: Topic, accept: Accept) -> OffsetPlan:
    """The plan of one topic, from the stream's positions and from what Kafka has.

    Args:
        topic: as Kafka describes it.
        accept: what the user has agreed to.

    Raises:
        ServiceError: the topic was deleted and recreated, or retention has removed offsets, and the user has not agreed
            to it.
    """
    name = positions.topic(topic.name)
    ends = positions.of_topic(name)
    stream = positions.stream or ""
    again = _recreation_error(topic, ends, positions.topics.get(name))
    if again is not None:
        name = name_in_tables(topic.name, number_of(name) + 1)
        if not accept.new_topic:
            raise ConflictError(
                f"{again}, and its offsets start over: read it from its first message with --accept-new-topic; the "
                f"tables will name it {name!r}"
            )
        return OffsetPlan(stream, positions.number, name, topic.begins, topic)
    if not ends and name not in positions.topics:  # a topic that the stream has not read before
        ends = topic.begins
    for partition, begin in sorted(topic.begins.items()):
        end = ends.get(partition, 0)
        if begin > end and not accept.loss:
            raise NotFoundError(
                f"topic {topic.name!r} partition {partition}: loss of up to {counted(begin - end, 'message')}, from "
                f"offset {end} to {begin - 1}: Kafka's retention removed them before they were read; use --accept-loss "
                "to continue without them"
            )
    return OffsetPlan(stream, positions.number, name, ends, topic)


def _recreation_error(topic: Topic, ends: Mapping[int, int], known_id: str | None) -> str | None:
    """Why this is not the topic that was read before; None if it is.

    A recreated topic has another id even if its offsets have grown past the old ones.
    """
    if known_id and known_id != topic.id:
        return f"topic {topic.name!r} was recreated (id {topic.id}, before {known_id})"
    for partition, offset in sorted(ends.items()):
        end = topic.ends.get(partition)
        if end is None or end < offset:
            have = "no longer exists" if end is None else f"ends at offset {end}"
            return (
                f"topic {topic.name!r} partition {partition} {have}, but messages up to {offset - 1} are committed: "
                "the topic was recreated"
            )
    return None
