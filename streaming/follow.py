"""Following predictions as they are made: `for answer in follow(): …`.

They come from the answers topic where the settings name one, else from the new versions of the table. Either way each
is given once, as JSON with the columns of its row, and with a position: text by which a later call continues just after
that answer. Positions of the two kinds are not interchangeable.
"""

import json
import re
import threading
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from producer.message import HEADER_TYPE
from streaming.errors import DataError, NotFoundError, ServiceError, UnavailableError
from streaming.settings import Settings, read_settings

EARLIEST, LATEST = "earliest", "latest"
TOPIC_POSITION = r"topic/([a-zA-Z0-9._-]{1,249})/(\d{1,10}:\d{1,18}(?:,\d{1,10}:\d{1,18}){0,9999})"
TABLE_POSITION = r"table/(\d{1,18})/(\d{1,18})"
IDLE_S = 0.5  # an iterator gives a sign this often while there is nothing new
POLL_S, POLL_IN_BUCKET_S = 0.1, 1.0
POLLED = 500  # messages at a time
NOT_POSITION = "expected earliest, latest or the position of an answer"


class PositionError(DataError):
    """A position that is not one, or whose answers are gone."""


@dataclass(frozen=True)
class Answer:
    """A prediction, or a quarantined message.

    Attributes:
        position: where to continue after it.
        value: JSON as docs/answers.schema.json describes it.
    """

    position: str
    value: bytes

    @property
    def row(self) -> dict[str, Any]:
        """The columns of the row."""
        row: dict[str, Any] = json.loads(self.value)
        return row


def follow(home: str | Path | None = None, *, after: str = LATEST, table: str = "predictions") -> Iterator[Answer]:
    """Predictions as they are made, without an end.

    Args:
        home: where the service keeps its things; without it as the command line finds it.
        after: the position of the last answer that was used; "latest" for those that come from now on, "earliest" for
            all that there are.
        table: predictions or quarantine.

    Raises:
        ServiceError: the broker or the tables cannot be read; a PositionError where `after` is not a position, or its
            answers are gone.
    """
    with closing(follow_settings(read_settings(home), after, table)) as answers:
        yield from (answer for answer in answers if answer is not None)


def follow_settings(
    settings: Settings, after: str = LATEST, table: str = "predictions"
) -> Generator[Answer | None, None, None]:
    """As `follow`, with None at least every second while there is nothing new; to be closed."""
    from streaming.pipeline.answers_topic import TABLES

    if settings.answers_topic is not None and table in TABLES[settings.answers]:
        return _from_topic(settings, settings.answers_topic, _topic_offsets(settings.answers_topic, after), table)
    return _from_table(settings, _table_row(after), table)


def _topic_offsets(topic: str, after: str) -> dict[int, int] | str:
    """Partition → the next offset; or EARLIEST or LATEST."""
    if after in {EARLIEST, LATEST}:
        return after
    match = re.fullmatch(TOPIC_POSITION, after, re.ASCII)
    if match is None or match[1] != topic:
        raise PositionError(f"{NOT_POSITION} from topic {topic!r}, got {after[:100]!r}")
    return {int(partition): int(offset) for partition, offset in (one.split(":") for one in match[2].split(","))}


def _table_row(after: str) -> tuple[int, int] | str:
    """(version of the table, rows of it that were given); or EARLIEST or LATEST."""
    if after in {EARLIEST, LATEST}:
        return after
    match = re.fullmatch(TABLE_POSITION, after, re.ASCII)
    if match is None:
        raise PositionError(f"{NOT_POSITION} from the table, got {after[:100]!r}")
    return int(match[1]), int(match[2])


def _from_topic(
    settings: Settings, topic: str, begin: dict[int, int] | str, table: str
) -> Generator[Answer | None, None, None]:
    from kafka.errors import KafkaError

    from streaming.pipeline.answer_message import TYPES
    from streaming.pipeline.answers_topic import answers_servers, open_consumer
    from streaming.platform.kafka_security import client_arguments

    wanted = (HEADER_TYPE, TYPES[table].encode())
    try:
        with closing(open_consumer(answers_servers(settings), client_arguments(settings))) as consumer:
            at = _assigned(consumer, topic, begin)
            while True:
                yield None
                for place, records in consumer.poll(timeout_ms=int(IDLE_S * 1000), max_records=POLLED).items():
                    for record in records:
                        at[place.partition] = record.offset + 1
                        if wanted in record.headers:
                            position = ",".join(f"{one}:{offset}" for one, offset in at.items())
                            yield Answer(f"topic/{topic}/{position}", record.value)
    except KafkaError as error:
        raise UnavailableError(f"answers topic {topic!r} cannot be read ({type(error).__name__}: {error})") from error


def _assigned(consumer: Any, topic: str, begin: dict[int, int] | str) -> dict[int, int]:
    """Partition → the offset that the consumer reads next."""
    from kafka import TopicPartition

    partitions = [TopicPartition(topic, one) for one in sorted(consumer.partitions_for_topic(topic) or ())]
    if not partitions:
        raise NotFoundError(f"answers topic {topic!r} is not there: start the stream with it first")
    first, last = consumer.beginning_offsets(partitions), consumer.end_offsets(partitions)
    at = {one.partition: (last if begin == LATEST else first)[one] for one in partitions}
    if isinstance(begin, dict):
        at |= {one: offset for one, offset in begin.items() if one in at}  # one added since begins at its first answer
    consumer.assign(partitions)
    for one in partitions:
        if not first[one] <= at[one.partition] <= last[one]:
            raise PositionError(
                f"offset {at[one.partition]} of partition {one.partition} is not in topic {topic!r}, which has "
                f"{first[one]} to {last[one]}: continue from earliest or latest"
            )
        consumer.seek(one, at[one.partition])
    return at


def _from_table(settings: Settings, begin: tuple[int, int] | str, table: str) -> Generator[Answer | None, None, None]:
    place, wait = settings.place, threading.Event()
    every_s = POLL_S if place.is_local else POLL_IN_BUCKET_S
    version, given = _first(settings, table, begin)
    while True:
        data = place.store.get(_entry_key(table, version))
        if data is None:
            if _newest(settings, table) > version:
                raise PositionError(
                    f"version {version} of table {table} is no longer in its log: continue from earliest or latest"
                )
            yield None
            wait.wait(every_s)
            continue
        for number, value in enumerate(_new_rows(settings, table, version, data)):
            if number >= given:
                yield Answer(f"table/{version}/{number + 1}", value)
        version, given = version + 1, 0


def _first(settings: Settings, table: str, begin: tuple[int, int] | str) -> tuple[int, int]:
    newest = _newest(settings, table)
    if begin == LATEST:
        return newest + 1, 0
    if isinstance(begin, tuple):
        if begin[0] > newest + 1:
            raise PositionError(f"table {table} has no version {begin[0]} yet: the position is that of another home")
        return begin
    names = (one.key.rpartition("/")[2] for one in settings.place.store.list(_log_of(table)))
    return min((int(name[:20]) for name in names if re.fullmatch(r"\d{20}\.json", name)), default=0), 0


def _newest(settings: Settings, table: str) -> int:
    from streaming.storage.table_log import open_delta

    return open_delta(settings.place.table(table)).version() if settings.place.has_table(table) else -1


def _new_rows(settings: Settings, table: str, version: int, data: bytes) -> Iterator[bytes]:
    """The rows that a version added; none of one that replaced files by others with the same rows."""
    from streaming.pipeline.answers_topic import file_messages
    from streaming.storage.files import DataFile

    actions = [json.loads(line) for line in data.splitlines() if line.strip()]
    if any("remove" in action for action in actions):
        return
    for add in (action["add"] for action in actions if action.get("add", {}).get("dataChange")):
        file = DataFile(unquote(add["path"]), add["size"], 0, add["partitionValues"])
        try:
            yield from (message.value for message in file_messages(table, settings.place.table(table), file))
        except (OSError, ServiceError) as error:
            raise PositionError(
                f"rows of version {version} of table {table} were removed ({error}): continue from earliest or latest"
            ) from error


def _log_of(table: str) -> str:
    return f"tables/{table}/_delta_log"


def _entry_key(table: str, version: int) -> str:
    return f"{_log_of(table)}/{version:020}.json"
