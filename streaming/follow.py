"""Following predictions as they are made: `for answer in follow(): …`.

They come from the answers topic if the settings name one, else from new versions of the table. Either way each is
yielded once, as JSON with the columns of its row, and with a position: text with which a later call continues after
that answer. Positions of the two kinds are not interchangeable.
"""

import json
import re
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from producer.message import HEADER_CONTENT_TYPE, HEADER_TYPE
from streaming.errors import DataError, NotFoundError, ServiceError, UnavailableError
from streaming.settings import Settings, read_settings

EARLIEST, LATEST = "earliest", "latest"
TOPIC_POSITION = r"topic/([a-zA-Z0-9._-]{1,249})/(\d{1,10}:\d{1,18}(?:,\d{1,10}:\d{1,18}){0,9999})"
TABLE_POSITION = r"table/(\d{1,18})/(\d{1,18})"
IDLE_S = 0.5  # interval at which an iterator yields an `Idle` while there is nothing new
POLL_S, POLL_IN_BUCKET_S = 0.1, 1.0
POLLED = 500  # maximum number of messages of one poll
NOT_POSITION = "expected earliest, latest or the position of an answer"


class PositionError(DataError):
    """Text that is not a position, or a position whose answers have been deleted."""


@dataclass(frozen=True)
class Answer:
    """A prediction, or a quarantined message.

    Attributes:
        position: where to continue after it.
        value: JSON as docs/answers.schema.json describes it, also if the topic has Avro records.
    """

    position: str
    value: bytes

    @property
    def row(self) -> dict[str, Any]:
        """The columns of the row."""
        row: dict[str, Any] = json.loads(self.value)
        return row


@dataclass(frozen=True)
class Idle:
    """There is nothing new: a later call continues at `position` without missing an answer."""

    position: str


def follow(home: str | Path | None = None, *, after: str = LATEST, table: str = "predictions") -> Iterator[Answer]:
    """Predictions as they are made, without an end.

    Args:
        home: the home, a path or a URI; default: that of the command line.
        after: position of the last answer that was processed; "latest" for new answers only, "earliest" for all.
        table: predictions or quarantine.

    Raises:
        ServiceError: the broker, the tables or an Avro record cannot be read; a PositionError if `after` is not a
            position, or its answers have been deleted.
    """
    with closing(follow_settings(read_settings(home), after, table)) as answers:
        yield from (answer for answer in answers if isinstance(answer, Answer))


def follow_settings(
    settings: Settings, after: str = LATEST, table: str = "predictions"
) -> Generator[Answer | Idle, None, None]:
    """As `follow`, with an `Idle` at least every second while there is nothing new; the caller closes it."""
    from streaming.pipeline.answers_topic import TABLES_BY_SETTING

    if settings.answers_topic is not None and table in TABLES_BY_SETTING[settings.answers]:
        return _from_topic(settings, settings.answers_topic, _topic_offsets(settings.answers_topic, after), table)
    return _from_table(settings, _table_row(after), table)


def _topic_offsets(topic: str, after: str) -> dict[int, int] | str:
    """Partition → the offset to read next; or EARLIEST or LATEST."""
    if after in {EARLIEST, LATEST}:
        return after
    match = re.fullmatch(TOPIC_POSITION, after, re.ASCII)
    if match is None or match[1] != topic:
        raise PositionError(f"{NOT_POSITION} from topic {topic!r}, got {after[:100]!r}")
    return {int(partition): int(offset) for partition, offset in (one.split(":") for one in match[2].split(","))}


def _table_row(after: str) -> tuple[int, int] | str:
    """(version of the table, number of its rows that were yielded); or EARLIEST or LATEST."""
    if after in {EARLIEST, LATEST}:
        return after
    match = re.fullmatch(TABLE_POSITION, after, re.ASCII)
    if match is None:
        raise PositionError(f"{NOT_POSITION} from the table, got {after[:100]!r}")
    return int(match[1]), int(match[2])


def _from_topic(
    settings: Settings, topic: str, begin: dict[int, int] | str, table: str
) -> Generator[Answer | Idle, None, None]:
    from kafka.errors import KafkaError

    from streaming.pipeline.answer_message import TYPES
    from streaming.pipeline.answers_reader import answers_servers, open_consumer
    from streaming.platform.kafka_security import client_arguments

    wanted, as_json = (HEADER_TYPE, TYPES[table].encode()), _json_reader(settings)
    try:
        with closing(open_consumer(answers_servers(settings), client_arguments(settings))) as consumer:
            at = _assigned(consumer, topic, begin)

            def position() -> str:
                return f"topic/{topic}/" + ",".join(f"{one}:{offset}" for one, offset in at.items())

            while True:
                yield Idle(position())
                for place, records in consumer.poll(timeout_ms=int(IDLE_S * 1000), max_records=POLLED).items():
                    for record in records:
                        at[place.partition] = record.offset + 1
                        if wanted in record.headers and record.value is not None:
                            yield Answer(position(), as_json(record))
    except KafkaError as error:
        raise UnavailableError(f"answers topic {topic!r} cannot be read ({type(error).__name__}: {error})") from error


def _json_reader(settings: Settings) -> Callable[[Any], bytes]:
    """A function from a record of the answers topic to the answer as JSON."""
    from streaming.pipeline.answer_avro import avro_rows
    from streaming.pipeline.answer_message import CONTENT_TYPES
    from streaming.pipeline.answer_value import json_value
    from streaming.pipeline.avro import RecordError
    from streaming.platform.schema_registry import RegistryAwayError

    avro, read = (HEADER_CONTENT_TYPE, CONTENT_TYPES["avro"].encode()), None

    def as_json(record: Any) -> bytes:
        nonlocal read
        if avro not in record.headers:
            return bytes(record.value)
        read = read or avro_rows(settings.schema_registry)
        try:
            return json_value(read(record.value))
        except (RecordError, RegistryAwayError) as error:
            kind = DataError if isinstance(error, RecordError) else UnavailableError
            place = f"offset {record.offset} of partition {record.partition}"
            raise kind(f"answers topic {record.topic!r}, {place}: {error}") from error

    return as_json


def _assigned(consumer: Any, topic: str, begin: dict[int, int] | str) -> dict[int, int]:
    """Partition → the offset that the consumer reads next."""
    from kafka import TopicPartition

    partitions = [TopicPartition(topic, one) for one in sorted(consumer.partitions_for_topic(topic) or ())]
    if not partitions:
        raise NotFoundError(f"answers topic {topic!r} does not exist: start the stream with it first")
    first, last = consumer.beginning_offsets(partitions), consumer.end_offsets(partitions)
    at = {one.partition: (last if begin == LATEST else first)[one] for one in partitions}
    if isinstance(begin, dict):
        # A partition that was added since then is read from its first answer.
        at |= {one: offset for one, offset in begin.items() if one in at}
    consumer.assign(partitions)
    for one in partitions:
        if not first[one] <= at[one.partition] <= last[one]:
            raise PositionError(
                f"offset {at[one.partition]} of partition {one.partition} is not in topic {topic!r}, which has "
                f"{first[one]} to {last[one]}: continue from earliest or latest"
            )
        consumer.seek(one, at[one.partition])
    return at


def _from_table(settings: Settings, begin: tuple[int, int] | str, table: str) -> Generator[Answer | Idle, None, None]:
    from streaming.pipeline.answer_value import answer_value, json_value

    place, wait = settings.place, threading.Event()
    every_s = POLL_S if place.is_local else POLL_IN_BUCKET_S
    version, given = _first(settings, table, begin)
    while True:
        data = place.store.get(f"{_log_of(table)}/{version:020}.json")
        if data is None:
            if _newest(settings, table) > version:
                raise PositionError(
                    f"version {version} of table {table} is no longer in its log: continue from earliest or latest"
                )
            yield Idle(f"table/{version}/0")
            wait.wait(every_s)
            continue
        for number, row in enumerate(_new_rows(settings, table, version, data)):
            if number >= given:
                yield Answer(f"table/{version}/{number + 1}", json_value(answer_value(table, row)))
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


def _new_rows(settings: Settings, table: str, version: int, data: bytes) -> Iterator[dict[str, Any]]:
    """The rows that a version added; none if it replaced files by others with the same rows."""
    from streaming.pipeline.answers_topic import file_rows
    from streaming.storage.files import DataFile

    actions = [json.loads(line) for line in data.splitlines() if line.strip()]
    if any("remove" in action for action in actions):
        return
    for add in (action["add"] for action in actions if action.get("add", {}).get("dataChange")):
        file = DataFile(unquote(add["path"]), add["size"], 0, add["partitionValues"])
        try:
            yield from file_rows(table, settings.place.table(table), file)
        except (OSError, ServiceError) as error:
            raise PositionError(
                f"rows of version {version} of table {table} were deleted ({error}): continue from earliest or latest"
            ) from error


def _log_of(table: str) -> str:
    return f"tables/{table}/_delta_log"
