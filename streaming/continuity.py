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
from streaming.ingest import planned_offsets
from streaming.offsets import committed_offsets
from streaming.pin import OffsetRange
from streaming.settings import Settings
from streaming.topic import Topic

TOPIC_ID_FILE = "topic.json"


@dataclass(frozen=True)
class Accept:
    """What the user has said to go on with."""

    loss: bool = False  # offsets that Kafka no longer holds
    new_partitions: bool = False


@dataclass
class Continuity:
    """Where every partition of a topic stands: partition → one past the last offset committed."""

    topic: str
    accept: Accept
    committed: dict[int, int] = field(default_factory=dict)

    def check(self, offsets: list[OffsetRange]) -> None:
        """Refuse a micro-batch that repeats committed offsets, or leaves some out."""
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

    def starting_offsets(self, topic: Topic) -> str:
        """Kafka's `startingOffsets`: exactly after what is committed, and from the first message elsewhere."""
        begins = {str(partition): self.committed.get(partition, begin) for partition, begin in topic.begins.items()}
        return json.dumps({topic.name: begins})


def read_continuity(settings: Settings, accept: Accept) -> Continuity:
    """What the table `batches` says of the settings' topic."""
    return Continuity(settings.topic, accept, committed_offsets(settings))


def check_checkpoint(continuity: Continuity, checkpoint: Path, *, resume: bool) -> None:
    """A checkpoint must be there if anything is committed, unless the user resumes from the tables.

    Raises:
        ServiceError: it is not, or it is and `resume` was asked for.
    """
    has_checkpoint = (checkpoint / "metadata").exists()
    if has_checkpoint and resume:
        raise ServiceError(f"--resume-from-tables begins a new checkpoint, but there is one in {checkpoint}")
    if continuity.committed and not has_checkpoint and not resume:
        total = sum(continuity.committed.values())
        raise ServiceError(
            f"the tables hold batches of topic {continuity.topic!r} up to {total} messages, but there is no checkpoint "
            f"in {checkpoint}: starting over would score them twice; put the checkpoint back, or start with "
            "--resume-from-tables to begin exactly after the last committed offsets"
        )


def check_topic(continuity: Continuity, topic: Topic, checkpoint: Path) -> None:
    """The topic must still be the one that was read, and hold what comes next.

    Raises:
        ServiceError: it was made again, partitions were added, or retention has eaten offsets; says which.
    """
    _check_identity(topic, checkpoint.parent / TOPIC_ID_FILE)
    known = planned_offsets(checkpoint).get(topic.name, {})
    added = sorted(set(topic.begins) - {int(partition) for partition in known}) if known else []
    if added and not continuity.accept.new_partitions:
        raise ServiceError(
            f"topic {topic.name!r} has new partitions: {', '.join(map(str, added))}; read them from their first "
            "message on with --accept-new-partitions"
        )
    for partition, expected in _next_offsets(continuity, known).items():
        begin, end = topic.begins.get(partition), topic.ends.get(partition)
        where = f"topic {topic.name!r} partition {partition}"
        if begin is None or end is None or end < expected:
            have = "is gone" if end is None else f"ends at offset {end}"
            raise ServiceError(
                f"{where} {have}, but messages up to {expected - 1} are committed: the topic was made again; "
                "publish to a topic of another name (--topic), so that offsets stay unique"
            )
        if begin > expected and not continuity.accept.loss:
            raise ServiceError(
                f"{where}: {begin - expected} messages are lost, from offset {expected} to {begin - 1}: Kafka's "
                "retention removed them before they were read; go on without them with --accept-loss"
            )


def _next_offsets(continuity: Continuity, known: Mapping[str, int]) -> dict[int, int]:
    """Partition → the next offset: what is committed, or what the checkpoint has planned where nothing is."""
    return {int(partition): offset for partition, offset in known.items()} | continuity.committed


def _check_identity(topic: Topic, path: Path) -> None:
    """A topic made again has another id, even where its offsets have grown past the old ones."""
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))["id"]
        if before != topic.id:
            raise ServiceError(
                f"topic {topic.name!r} was made again (id {topic.id}, before {before}): its offsets start over; "
                "publish to a topic of another name (--topic), so that offsets stay unique"
            )
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps({"id": topic.id}), encoding="utf-8")
    scratch.replace(path)
