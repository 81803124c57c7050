"""The first start of a stream: creates its identity, and migrates the tables of an earlier release if there are any.

A home of an earlier release has `checkpoints/TOPIC`, with Spark's checkpoint, a pin for each micro-batch and
`topic.json`. The offsets are taken from the tables, and an interrupted batch is scored again. Tables whose `streams/`
was lost are treated in the same way. Existing rows keep their query ids.

    1. lock      take the old lock, so that no old driver is running
    2. read      the ends from `batches`, the topic's id from `topic.json`, first offsets from Spark's checkpoint
    3. check     that Kafka has the next messages, as at every start
    4. delete    the rows beyond the ends, which belong to an interrupted batch
    5. create    `streams/NAME/stream.json`, with these ends as its first offsets
    6. rename    `checkpoints/TOPIC` to `checkpoints.old/TOPIC`

If a start is interrupted before step 5, the next one repeats all steps; after step 5, it repeats only step 6.
"""

import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

from streaming.errors import ConflictError, DamagedError
from streaming.pipeline.decisions import DECIDED_TABLES, TopicPartition
from streaming.pipeline.finish import Tables
from streaming.pipeline.ingest import first_offsets
from streaming.pipeline.positions import (
    Accept,
    FirstOffset,
    Positions,
    StreamIdentity,
    check_not_shared,
    ends_of_all,
    identity_key,
    name_in_kafka,
    name_in_tables,
    plan_start,
    read_identity,
)
from streaming.platform.topic import Topic
from streaming.settings import Settings
from streaming.storage.home import try_lock

NO_OFFSETS: Mapping[TopicPartition, int] = MappingProxyType({})


def begin_stream(
    settings: Settings,
    tables: Tables,
    topics: Sequence[Topic],
    accept: Accept,
    *,
    first: Mapping[TopicPartition, int] = NO_OFFSETS,
    reads: str = "",
) -> Positions:
    """Create the identity of a stream that has none, and return its positions.

    Args:
        settings: their topic is the name of the stream.
        tables: created if they do not exist.
        topics: all topics of the subscription that exist now.
        accept: what the user has agreed to.
        first: (topic in Kafka, partition) → where to begin a partition that is not in the tables; by default, at the
            start of its log.
        reads: a description of the subscription.

    Raises:
        ServiceError: a topic was deleted and recreated, another stream reads one of the topics, offsets are lost, or
            the store does not support conditional puts.
    """
    store = settings.place.store
    store.check_conditional()
    check_not_shared(settings, [topic.name for topic in topics])
    ids: dict[str, str] = {}
    starts: list[FirstOffset] = []
    for topic in topics:
        before = _migrated_positions(settings, topic, first)
        plan = plan_start(before, topic, accept)
        name = before.topic(topic.name)
        for table in DECIDED_TABLES:
            if settings.place.has_table(table):
                tables[table].delete_beyond(name, before.of_topic(name))
        # The id of a recreated topic is recorded by its first decision.
        ids[name] = before.topics.get(name) or (topic.id if name in plan.topics else "")
        starts += [FirstOffset(*place, offset) for place, offset in sorted(before.ends.items())]
    key = identity_key(settings.topic)
    identity = StreamIdentity(str(uuid.uuid4()), reads or settings.topic, ids, tuple(starts))
    for table in (*DECIDED_TABLES, "batches"):  # created together, so that readers find all or none
        tables[table]
    if not store.create(key, identity.to_json()):
        found = read_identity(settings, settings.topic)
        if found is None:
            raise ConflictError(
                f"{store.place}/{key} was created by another stream and deleted: start the stream again"
            )
        identity = found
    return Positions(identity.id, 0, {(o.topic, o.partition): o.offset for o in identity.first}, identity.topics)


@contextmanager
def old_stream_lock(settings: Settings) -> Iterator[None]:
    """Hold the lock of a stream of an earlier release, if there was one.

    Raises:
        ServiceError: such a stream is running.
    """
    folder = _old_folder(settings, settings.topic)
    if not folder.is_dir():
        yield
        return
    busy = f"a stream of an earlier release is running on topic {settings.topic!r} in {settings.home}: stop it first"
    with try_lock(folder / ".lock", busy):
        yield


def set_checkpoint_aside(settings: Settings) -> None:
    """Rename the checkpoint of an earlier release, and delete its state file; they are not read again."""
    folder = _old_folder(settings, settings.topic)
    if not folder.is_dir():
        return
    (settings.work_dir / f"stream-{settings.topic}.json").unlink(missing_ok=True)
    aside = settings.work_dir / "checkpoints.old"
    aside.mkdir(exist_ok=True)
    target, number = aside / folder.name, 1
    while target.exists():
        number += 1
        target = aside / f"{folder.name}.{number}"
    folder.rename(target)
    with suppress(OSError):  # it has checkpoints of other topics
        folder.parent.rmdir()


def _migrated_positions(settings: Settings, topic: Topic, first: Mapping[TopicPartition, int]) -> Positions:
    """Positions from the tables and an old checkpoint; otherwise from `first`, or from the start of Kafka's log."""
    folder = _old_folder(settings, topic.name)
    known = _old_topic(folder / "topic.json", topic.name)
    ours = {place: end for place, end in ends_of_all(settings).items() if name_in_kafka(place[0]) == topic.name}
    name = Positions(ends=ours, topics=known).topic(topic.name)
    # Only Spark's checkpoint has the start of a partition that no batch had messages of.
    began = first_offsets(folder / "spark").get(topic.name, {})
    ends = {(name, one): began.get(one, first.get((topic.name, one), begin)) for one, begin in topic.begins.items()}
    return Positions(ends=ends | {place: end for place, end in ours.items() if place[0] == name}, topics=known)


def _old_topic(path: Path, topic: str) -> Mapping[str, str]:
    """Topic in the tables → topic id, of the topic that an earlier release read last.

    Raises:
        ServiceError: the file is damaged.
    """
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        number, id_ = content["number"], content["id"]
        if not (isinstance(number, int) and isinstance(id_, str)):
            raise TypeError(f"expected a number and an id, got {number!r} and {id_!r}")  # noqa: TRY301
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DamagedError(f"{path}, which identifies the topic, is damaged: {error}; restore it") from error
    return {name_in_tables(topic, number): id_}


def _old_folder(settings: Settings, topic: str) -> Path:
    return settings.work_dir / "checkpoints" / topic
