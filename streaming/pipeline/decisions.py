"""Decisions: the write-ahead log of the stream. A decision fixes a scored micro-batch before any table shows its rows.

A decision is an object `streams/NAME/batches/<number>.json`, created once and never changed. It lists the offsets, the
models, the figures and every data file of the batch, so that any process can complete the batch from it alone, without
Kafka, Spark or a model. If several drivers decide the same number, exactly one succeeds, and each knows whether it did.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from streaming.errors import ConfigurationError, DamagedError, ServiceError
from streaming.pipeline.answer_value import ANSWERED_TABLES
from streaming.storage.files import STRICT, DataFile
from streaming.storage.numbered import numbered, numbered_key
from streaming.storage.store import Store, check_key
from streaming.storage.tables import SCHEMAS

if TYPE_CHECKING:
    from pydantic import TypeAdapter

FORMAT = 1
FORMAT_WITH_ANSWERS = 2  # releases without an answers topic must not complete such a batch
# Nor releases without Avro. The format also identifies the schema of `schema_id`: other fields need another format.
FORMAT_WITH_AVRO = 3
FORMATS = (FORMAT, FORMAT_WITH_ANSWERS, FORMAT_WITH_AVRO)
# The tables that a decision has files for, in the order in which they are committed; `batches` comes after them.
DECIDED_TABLES = ("predictions", "quarantine", "shadow", "features")
KEPT = 200  # decisions of the newest complete batches
KEPT_FOR = timedelta(days=1)
NUMBER_DIGITS = 20  # of the keys
KAFKA_TOPIC = r"[a-zA-Z0-9._-]{1,249}"
MAX_INT32, MAX_INT64 = 2**31 - 1, 2**63 - 1

TopicPartition = tuple[str, int]  # topic, partition; by the topic's name in the tables unless it says otherwise


@dataclass(frozen=True)
class OffsetRange:
    """Offsets of one partition, from `start` (inclusive) to `end` (exclusive)."""

    topic: str  # its name in the tables
    partition: int
    start: int
    end: int

    __pydantic_config__: ClassVar = STRICT


@dataclass(frozen=True)
class CountedRange(OffsetRange):
    """A range with the number of messages that were read from it.

    Attributes:
        rows: messages.
        log_start: the start of the partition's log after the range was read; set only if there are fewer rows than
            offsets.
    """

    rows: int
    log_start: int | None = None


@dataclass(frozen=True)
class ModelVersion:
    """A model version, by its number and by the SHA-256 of its bundle."""

    version: int
    sha256: str

    __pydantic_config__: ClassVar = STRICT


@dataclass(frozen=True)
class AnswersDue:
    """The rows of a batch that are to be sent as messages.

    Attributes:
        topic: name in Kafka.
        topic_id: id in Kafka.
        tables: some of `ANSWERED_TABLES`.
        format: of the messages' values.
        schema_id: of the Avro schema in a schema registry; None without one.
    """

    topic: str
    topic_id: str
    tables: tuple[str, ...]
    format: Literal["json", "avro"] = "json"
    schema_id: int | None = None

    __pydantic_config__: ClassVar = STRICT


@dataclass(frozen=True)
class Figures:
    """The columns of the row in `batches` other than lineage and offsets."""

    input_bytes: int
    predicted_rows: int
    quarantined: dict[str, int]  # reason → messages
    seconds: dict[str, float]  # stage → seconds, until the decision
    refused: str | None
    drift: dict[str, float]
    started_at: datetime

    __pydantic_config__: ClassVar = STRICT


@dataclass(frozen=True)
class Decision:
    """A micro-batch.

    Attributes:
        number: of the batch in its stream, from 1; its `batch_id` in the tables.
        stream: the stream's id, the `query_id` in the tables.
        ranges: the offsets of the batch, one range per partition.
        topics: topic in the tables → topic id in Kafka.
        left_out: offsets that were lost before they were read and that the user agreed to skip.
        files: table → its data files, which no commit refers to yet.
        nonce: random, so that no two decisions are equal.
        answers: what is sent to the answers topic before the batch is complete; None without an answers topic.
    """

    number: int
    stream: str
    ranges: tuple[CountedRange, ...]
    model: ModelVersion
    challenger: ModelVersion | None
    topics: dict[str, str]
    left_out: tuple[OffsetRange, ...]
    figures: Figures
    files: dict[str, tuple[DataFile, ...]]
    decided_at: datetime
    nonce: str
    answers: AnswersDue | None = None

    __pydantic_config__: ClassVar = STRICT

    @property
    def input_rows(self) -> int:
        return sum(one.rows for one in self.ranges)

    def to_json(self) -> bytes:
        content, format_ = asdict(self), FORMAT_WITH_AVRO
        if self.answers is None:
            del content["answers"]
            format_ = FORMAT
        elif self.answers.format == "json":
            del content["answers"]["format"], content["answers"]["schema_id"]
            format_ = FORMAT_WITH_ANSWERS
        return json.dumps({"format": format_, **content}, default=datetime.isoformat).encode()

    @classmethod
    def from_json(cls, data: bytes, name: str) -> "Decision":
        """Parse and validate a decision.

        Args:
            data: the object's bytes; they are not trusted.
            name: the object's name in errors.

        Raises:
            ServiceError: it is damaged, inconsistent, or in another format.
        """
        decision: Decision = parse_object(data, name, "decision", FORMATS, _decision_type())
        if problem := next(_problems(decision), None):
            raise DamagedError(f"the decision {name} is damaged: {problem}; restore it from a copy")
        return decision


def parse_object(data: bytes, name: str, kind: str, formats: Sequence[int], type_: "TypeAdapter[Any]") -> Any:
    """Parse a JSON object strictly by its dataclass.

    Args:
        data: the object's bytes; they are not trusted.
        name: the object's name in errors.
        kind: what it is, in errors, e.g. `decision`.
        formats: the accepted values of its field `format`.

    Raises:
        ServiceError: it is damaged, or in another format; the message names the object and the problem.
    """
    from pydantic import ValidationError

    try:
        content = json.loads(data)
        found = content.pop("format", None)
    except (ValueError, RecursionError, AttributeError, TypeError) as error:
        raise DamagedError(f"the {kind} {name} is damaged: expected a JSON object; restore it from a copy") from error
    if found not in formats or isinstance(found, bool):
        raise ConfigurationError(
            f"the {kind} {name} has format {str(found)[:20]!r}, expected {' or '.join(map(str, formats))}: use the "
            "release that wrote it, or a later one"
        )
    try:
        return type_.validate_json(json.dumps(content), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))[:100]
        raise DamagedError(
            f"the {kind} {name} is damaged: {where!r}: {first['msg']}; restore it from a copy"
        ) from error


@cache
def _decision_type() -> "TypeAdapter[Any]":
    from pydantic import TypeAdapter  # imported here: Python workers import this module but never read a decision

    return TypeAdapter(Decision)


def _problems(decision: Decision) -> Iterator[str]:
    """The inconsistencies of a decision whose types are right."""
    if not 0 < decision.number <= MAX_INT64 or not decision.nonce:
        yield "expected a positive number and a nonce"
    for model in (decision.model, decision.challenger):
        if model is not None and not 0 < model.version <= MAX_INT32:
            yield f"'model': expected a positive version, got {model.version}"
    yield from _range_problems(decision)
    yield from _answers_problems(decision.answers)
    figures = decision.figures
    counts = [figures.predicted_rows, figures.input_bytes, *figures.quarantined.values()]
    if any(not 0 <= count <= MAX_INT64 for count in counts):
        yield "'figures' must not be negative"
    if unknown := set(decision.files) - set(DECIDED_TABLES):
        yield f"'files': unexpected table {min(unknown)!r}"
    for name, files in files_of(decision).items():
        yield from (f"'files': {problem}" for file in files for problem in _file_problems(name, file))
    rows = {name: sum(file.rows for file in files) for name, files in files_of(decision).items()}
    predicted, quarantined = rows.get("predictions", 0), rows.get("quarantine", 0)
    found = (predicted, quarantined, predicted + quarantined)
    if found != (figures.predicted_rows, sum(figures.quarantined.values()), decision.input_rows):
        yield f"'files' have {predicted} predicted and {quarantined} quarantined rows, unlike 'figures' or 'ranges'"
    if rows.get("features", predicted) != predicted:
        yield f"'files' have features of {rows['features']} messages, but {predicted} predicted rows"


def _range_problems(decision: Decision) -> Iterator[str]:
    for one in (*decision.ranges, *decision.left_out):
        if not (0 <= one.partition <= MAX_INT32 and 0 <= one.start < one.end <= MAX_INT64):
            yield f"'ranges': expected offsets with start < end, got {one}"
        if one.topic not in decision.topics:
            yield f"'topics' lacks {one.topic!r}"
    partitions = [(one.topic, one.partition) for one in decision.ranges]
    if not partitions or len(set(partitions)) < len(partitions):
        yield "'ranges' must have each partition once"
    if any(not 0 <= one.rows <= one.end - one.start for one in decision.ranges):
        yield "'ranges' have more rows than offsets"
    if any(not 0 <= (one.log_start or 0) <= MAX_INT64 for one in decision.ranges):
        yield "'ranges' have a 'log_start' that is not an offset"


def _answers_problems(answers: AnswersDue | None) -> Iterator[str]:
    if answers is None:
        return
    if not re.fullmatch(KAFKA_TOPIC, answers.topic) or not answers.topic_id:
        yield "'answers' must have a topic and its id"
    if not answers.tables or not set(answers.tables) <= set(ANSWERED_TABLES):
        yield f"'answers' must have tables of {', '.join(ANSWERED_TABLES)}"
    if answers.schema_id is not None and (answers.format == "json" or not 0 <= answers.schema_id <= MAX_INT32):
        yield "'answers' must have the id of an Avro schema, or none"


def _file_problems(table: str, file: DataFile) -> Iterator[str]:
    try:
        check_key(file.path)
    except ServiceError as error:
        yield str(error)
    if not (0 < file.bytes <= MAX_INT64 and 0 < file.rows <= MAX_INT64):
        yield f"{file.path}: bytes and rows must be positive"
    by = SCHEMAS[table][1]
    if set(file.partition) != ({by} if by else set()):
        yield f"{file.path} must have {f'the partition {by!r}' if by else 'no partition'}"
    try:
        stats = {} if file.stats is None else json.loads(file.stats)
    except (ValueError, RecursionError):
        stats = None
    if not isinstance(stats, dict):
        yield f"{file.path}: the statistics must be a JSON object"


class Decisions:
    """The decisions of one stream.

    Args:
        stream: the stream's name.
    """

    def __init__(self, store: Store, stream: str) -> None:
        self._store = store
        self._folder = f"streams/{stream}/batches"

    def read(self, number: int) -> Decision | None:
        """The decision of a batch; None if the number is not decided yet, or its decision was pruned.

        Raises:
            ServiceError: the object is damaged.
        """
        key = self._key(number)
        data = self._store.get(key)
        if data is None:
            return None
        decision = Decision.from_json(data, f"{self._store.place}/{key}")
        if decision.number != number:
            raise DamagedError(f"the decision {self._store.place}/{key} is that of batch {decision.number}: restore it")
        return decision

    def decide(self, decision: Decision) -> bool:
        """Record a decision; False if another decision of this number exists."""
        return self._store.create(self._key(decision.number), decision.to_json())

    def prune(self, newest: int, keep: int = KEPT, kept_for: timedelta = KEPT_FOR) -> int:
        """Delete old decisions of complete batches, and return their number.

        Args:
            newest: the number of the newest batch in the table `batches`. Its decision is always kept, so that a driver
                that finds its own number there can be sure that it is the batch that it decided.
            kept_for: the minimum age of a deleted decision.
        """
        last, before = newest - max(1, keep), datetime.now(UTC) - kept_for
        old = [
            one.key
            for number, one in numbered(self._store, self._folder, NUMBER_DIGITS)
            if number <= last and one.modified < before
        ]
        self._store.delete(old)
        return len(old)

    def _key(self, number: int) -> str:
        return numbered_key(self._folder, number, NUMBER_DIGITS)


def files_of(decision: Decision) -> Mapping[str, Sequence[DataFile]]:
    """The files of each table that has any, in the order of the commits."""
    return {name: decision.files[name] for name in DECIDED_TABLES if decision.files.get(name)}
