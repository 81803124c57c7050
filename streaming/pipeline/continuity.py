"""Offsets without a gap and without a repeat: what is about to be scored must begin where `batches` ends.

The table `batches` is the truth about what was committed; a checkpoint only remembers what Spark planned. Whatever the
two disagree on (a checkpoint lost or put back, a topic made again, offsets that retention has eaten) stops the stream
with the partition and the offsets in the message, before anything is scored twice or left out silently.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from streaming.errors import ServiceError
from streaming.pipeline.incarnation import Incarnation, name_in_tables, number_of
from streaming.pipeline.ingest import planned_offsets
from streaming.pipeline.offsets import committed_offsets
from streaming.pipeline.pin import OffsetRange
from streaming.platform.topic import Topic
from streaming.settings import Settings


@dataclass(frozen=True)
class Accept:
    """What the user has said to go on with."""

    loss: bool = False  # offsets that Kafka no longer holds
    new_partitions: bool = False
    new_topic: bool = False  # a topic that was made again under its name

    @property
    def from_tables(self) -> bool:
        """Whether the tables may be followed where the checkpoint cannot."""
        return self.loss or self.new_topic


@dataclass
class Continuity:
    """Where every partition of a topic stands: partition → one past the last offset committed.

    `topic` is its name in the tables.
    """

    topic: str
    committed: dict[int, int] = field(default_factory=dict)
    accept: Accept = field(default_factory=Accept)

    def check(self, offsets: list[OffsetRange]) -> list[OffsetRange]:
        """Refuse a micro-batch that repeats committed offsets, or leaves some out.

        Returns:
            What it leaves out with the user's consent.
        """
        left_out = []
        for one in offsets:
            expected = self.committed.get(one.partition)
            if expected is None or one.start == expected:
                continue
            where = f"topic {one.topic!r} partition {one.partition}"
            if one.start < expected:
                raise ServiceError(
                    f"{where}: the next batch begins at offset {one.start}, but {expected - one.start} messages from "
                    f"there to {expected - 1} are committed already; the checkpoint is not the one that committed "
                    "them: put it back, or remove it and start with --resume-from-tables"
                )
            if not self.accept.loss:
                raise ServiceError(
                    f"{where}: {one.start - expected} messages are missing, from offset {expected} to "
                    f"{one.start - 1}; go on without them with --accept-loss"
                )
            left_out.append(OffsetRange(one.topic, one.partition, expected, one.start))
        return left_out

    def check_whole(self, offsets: list[OffsetRange]) -> None:
        """Refuse a batch that is whole in the tables but was planned anew, by an older copy of the checkpoint, to hold
        more than was committed under its number."""
        for one in offsets:
            committed = self.committed.get(one.partition, 0)
            if one.end > committed:
                raise ServiceError(
                    f"topic {one.topic!r} partition {one.partition}: the checkpoint plans a batch up to offset "
                    f"{one.end} that is committed up to {committed} only: the checkpoint is an older copy; put the "
                    "latest back, or remove it and start with --resume-from-tables"
                )

    def advance(self, offsets: list[OffsetRange]) -> None:
        """Take in a committed micro-batch."""
        for one in offsets:
            self.committed[one.partition] = one.end


def read_continuity(settings: Settings, accept: Accept) -> Continuity:
    """What the table `batches` says of the settings' topic."""
    return Continuity(*committed_offsets(settings), accept=accept)


def check_checkpoint(continuity: Continuity, checkpoint: Path, *, resume: bool) -> None:
    """A checkpoint must be there if anything is committed, unless the user resumes from the tables.

    Raises:
        ServiceError: it is not, or it is and `resume` was asked for.
    """
    has_checkpoint = (checkpoint / "metadata").exists()
    if has_checkpoint and resume:
        raise ServiceError(f"--resume-from-tables begins a new checkpoint, but there is one in {checkpoint}")
    if continuity.committed and not has_checkpoint and not resume and not continuity.accept.from_tables:
        total = sum(continuity.committed.values())
        raise ServiceError(
            f"the tables hold batches of topic {continuity.topic!r} up to {total} messages, but there is no checkpoint "
            f"in {checkpoint}: starting over would score them twice; put the checkpoint back, or start with "
            "--resume-from-tables to begin exactly after the last committed offsets"
        )


@dataclass(frozen=True)
class Start:
    """Where and how a stream begins.

    Attributes:
        continuity: what it continues.
        incarnation: the topic that it reads.
        anew: the checkpoint can no longer be followed, and the user has said to go on from the tables.
    """

    continuity: Continuity
    incarnation: Incarnation
    anew: bool

    def starting_offsets(self, topic: Topic) -> str:
        """Kafka's `startingOffsets`: exactly after what is committed, or at the first message that is still there."""
        committed = self.continuity.committed
        begins = {str(one): max(committed.get(one, begin), begin) for one, begin in topic.begins.items()}
        return json.dumps({topic.name: begins})


def check_topic(continuity: Continuity, topic: Topic, checkpoint: Path, before: Incarnation | None) -> Start:
    """The topic must still be the one that was read, and hold what comes next, or the user must have said to go on.

    Args:
        before: the topic that was read last, where that is remembered.

    Raises:
        ServiceError: it was made again, partitions were added, or retention has eaten offsets; says which.
    """
    known = planned_offsets(checkpoint).get(topic.name, {})
    expected = {int(partition): offset for partition, offset in known.items()} | continuity.committed
    number = number_of(continuity.topic)
    again = _made_again(topic, expected, before)
    if again is not None:
        if not continuity.accept.new_topic:
            raise ServiceError(
                f"{again}: its offsets start over; read it from its first message on with --accept-new-topic, which "
                f"has its rows in the tables as topic {name_in_tables(topic.name, number + 1)!r}"
            )
        renamed = Continuity(name_in_tables(topic.name, number + 1), {}, continuity.accept)
        return Start(renamed, Incarnation(topic.id, number + 1), anew=True)
    added = sorted(set(topic.begins) - {int(partition) for partition in known}) if known else []
    if added and not continuity.accept.new_partitions:
        raise ServiceError(
            f"topic {topic.name!r} has new partitions: {', '.join(map(str, added))}; read them from their first "
            "message on with --accept-new-partitions"
        )
    lost = {one: offset for one, offset in expected.items() if topic.begins[one] > offset}
    for partition, offset in lost.items():
        if not continuity.accept.loss:
            begin = topic.begins[partition]
            raise ServiceError(
                f"topic {topic.name!r} partition {partition}: {begin - offset} messages are lost, from offset {offset} "
                f"to {begin - 1}: Kafka's retention removed them before they were read; go on without them with "
                "--accept-loss"
            )
    return Start(continuity, Incarnation(topic.id, number), anew=bool(lost))


def _made_again(topic: Topic, expected: Mapping[int, int], before: Incarnation | None) -> str | None:
    """How it shows that the topic is another than the one that was read; None if it does not.

    A topic made again has another id, even where its offsets have grown past the old ones.
    """
    if before is not None and before.id != topic.id:
        return f"topic {topic.name!r} was made again (id {topic.id}, before {before.id})"
    for partition, offset in sorted(expected.items()):
        end = topic.ends.get(partition)
        if end is None or end < offset:
            have = "is gone" if end is None else f"ends at offset {end}"
            return (
                f"topic {topic.name!r} partition {partition} {have}, but messages up to {offset - 1} are committed: "
                "the topic was made again"
            )
    return None


def set_aside(checkpoint: Path) -> None:
    """Rename a checkpoint that is no longer followed; it may tell somebody what Spark had planned."""
    if not checkpoint.exists():
        return
    number = 1
    while (aside := checkpoint.with_name(f"{checkpoint.name}.aside-{number}")).exists():
        number += 1
    checkpoint.rename(aside)
