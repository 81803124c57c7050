"""The answers topic: the rows of every decided batch as messages, sent exactly once, together with the tables.

Every process that applies a decision (the stream, or a command that finishes a batch after it) sends its answers in one
Kafka transaction, which also commits the number of the batch as the offset of a consumer group. Readers of committed
messages therefore see all answers of a batch or none, and a process that applies the decision again knows whether they
were sent:

    1. fence     open a producer with the stream's transactional id: the open transaction of an earlier producer is
                 aborted or completed, and that producer is fenced, so that it cannot commit any more
    2. compare   the group's offset with the batch's number: if it is not lower, the answers have been sent
    3. send      the rows of the data files that the decision names, then the number as the group's offset
    4. commit

1 and 2 are skipped while this process has the newest producer: had another one sent anything, the commit would fail.
After any error the producer is abandoned and 1 is done again, which reveals the outcome of the failed transaction.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from random import uniform
from typing import Any

import pyarrow as pa

from producer.message import HEADER_SOURCE
from streaming.errors import ConfigurationError, ConflictError, DamagedError, ServiceError
from streaming.pipeline.answer_avro import avro_text
from streaming.pipeline.answer_message import HEADER_BATCH, AnswerMessage, answer_message
from streaming.pipeline.answer_value import answer_fields
from streaming.pipeline.answers_reader import (
    ANSWER_TIMEOUT_S,
    AnswersAwayError,
    answers_servers,
    check_messages,
    committed_batch,
    open_consumer,
    records_until,
    transactional_id_of,
)
from streaming.pipeline.decisions import AnswersDue, Decision
from streaming.platform.kafka_probe import RefusedError
from streaming.platform.kafka_security import client_arguments
from streaming.platform.schema_registry import RegistryAwayError, register_schema
from streaming.platform.topic import Subscription, Topic, TopicOperation, describe_topic
from streaming.platform.transactional_producer import TransactionalProducer, is_fencing, topics_in_transaction
from streaming.settings import Settings
from streaming.storage.files import DataFile, local_copy, read_as
from streaming.storage.tables import SCHEMAS

TABLES_BY_SETTING = {
    "predictions": ("predictions",),
    "quarantine": ("quarantine",),
    "both": ("predictions", "quarantine"),
}
TRIES = 6  # to send the answers of a batch while other processes fence this one
FENCED_S = (0.2, 1.0)  # bounds of the random wait before the next try, so that one of two processes succeeds
CLOCKS_S = 600.0  # maximum difference between the clocks of a broker and of a stream
SERVERS = "--answers-bootstrap-servers (IMAGESTREAM_ANSWERS_BOOTSTRAP_SERVERS)"
HEADERS_OF = {"predictions": (), "quarantine": ("headers",)}  # further columns that an answer's headers come from


@dataclass(frozen=True)
class AnswersState:
    """State of the answers of a stream.

    Attributes:
        batch: number of the newest batch whose answers are committed; None before the first.
        at: time of that transaction, in seconds since 1970; None if an earlier process committed it.
        messages: number of answers of that batch.
        backlog: number of answers of a decided batch that are not committed yet.
    """

    topic: str
    batch: int | None = None
    at: float | None = None
    messages: int = 0
    backlog: int = 0


@dataclass
class _Open:
    """A producer that is not fenced, as far as is known."""

    producer: TransactionalProducer
    stream: str
    topic: str
    committed: int | None  # number of the newest batch whose answers are committed


@dataclass
class AnswersTopic:
    """Sends the answers of one stream; used by one thread at a time. Connects when there is something to send.

    Args:
        accept_new_topic: send pending answers to a topic that was recreated under the same name.
        on_change: called with the new state whenever it changes.

    Attributes:
        due: what the stream records in its decisions; None without an answers topic.
    """

    settings: Settings
    accept_new_topic: bool = False
    on_change: Callable[[AnswersState], None] = lambda _: None
    due: AnswersDue | None = None
    _open: _Open | None = field(default=None, init=False)
    _state: AnswersState | None = field(default=None, init=False)

    def prepare(self, reads: Subscription) -> None:
        """Check the answers topic before a stream starts; it is created if it does not exist.

        Args:
            reads: the topics that images are read from.

        Raises:
            ServiceError: images are read from it, it holds other messages than this stream would send, or its brokers
                or the schema registry do not respond or deny access.
        """
        name = self.settings.answers_topic
        if name is None:
            return
        if reads.includes(name):
            raise ConfigurationError(
                f"--answers-topic: {name!r} is a topic that the stream reads images from: choose another name"
            )
        topics = [self._described(name, right) for right in (TopicOperation.WRITE, TopicOperation.READ)]
        check_messages(self.settings, topics[0])
        format_ = self.settings.answers_format
        schema_id = self._registered(name) if format_ == "avro" else None
        self.due = AnswersDue(name, topics[0].id, TABLES_BY_SETTING[self.settings.answers], format_, schema_id)

    def begin(self, stream: str, number: int) -> None:
        """Fence earlier producers of the stream, and commit a first transaction, without a message.

        Args:
            number: of the newest complete batch; its answers are committed, or were not due.

        Raises:
            ServiceError: the broker has no transactions, or this user has no permission for them or the group; an
                AnswersAwayError if no transaction is completed in time, another program uses the transactional id,
                another process fences this one, or the topic has later batches.
        """
        if self.due is None:
            return
        topic = self.due.topic

        def commit() -> None:
            self._check_transactional_id(stream, topic)
            opened = self._opened(stream, topic)
            if opened.committed is not None and opened.committed > number:
                raise AnswersAwayError(
                    f"answers topic {topic!r} has batch {opened.committed} of this stream, and the tables end with "
                    f"batch {number}: another process runs the stream, or the home was restored from an older copy, "
                    "which needs another --answers-topic"
                )
            self._transact(opened, number, ())

        self._until_not_fenced(commit, stream, topic)
        self._report(AnswersState(topic, number))

    def send(self, decision: Decision, place: str, on_step: Callable[[str], None] = lambda _: None) -> None:
        """Send the answers of a decided batch, unless they are committed already.

        Args:
            place: of the home's tables, a path or a URI.
            on_step: called with "send" when all are sent and none is committed, and with "answers" after the commit.

        Raises:
            ServiceError: the broker refuses them, or the data files cannot be read; an AnswersAwayError if the broker
                does not respond.
        """
        due = decision.answers
        if due is None:
            return
        rows = sum(file.rows for table in due.tables for file in decision.files.get(table, ()))
        before = self._state if self._state is not None and self._state.topic == due.topic else AnswersState(due.topic)
        self._report(replace(before, backlog=rows))
        self._until_not_fenced(lambda: self._send(decision, due, place, on_step), decision.stream, due.topic)
        self._report(AnswersState(due.topic, decision.number, datetime.now(UTC).timestamp(), rows))
        on_step("answers")

    def close(self) -> None:
        """Abandon the producer; an open transaction is aborted by the next one, or by the broker after a minute."""
        opened, self._open = self._open, None
        if opened is not None:
            opened.producer.abandon()

    def _until_not_fenced(self, send: Callable[[], None], stream: str, topic: str) -> None:
        from kafka.errors import KafkaError

        for attempt in range(1, TRIES + 1):
            try:
                send()
            except BaseException as error:
                fenced = is_fencing(error) or (self._open is not None and self._open.producer.is_fenced)
                self.close()
                if not isinstance(error, KafkaError):
                    raise
                if not fenced or attempt == TRIES:
                    raise _as_service_error(error, fenced, stream, topic) from error
            else:
                return
            threading.Event().wait(uniform(*FENCED_S))  # noqa: S311  no secret

    def _send(self, decision: Decision, due: AnswersDue, place: str, on_step: Callable[[str], None]) -> None:
        opened = self._open
        if opened is None or (opened.stream, opened.topic) != (decision.stream, due.topic):
            self.close()
            self._check_topic(decision, due)
            opened = self._opened(decision.stream, due.topic)
            if opened.committed is None and self._has_answers(decision, due):
                opened.committed = decision.number
        if opened.committed is None or opened.committed < decision.number:
            self._transact(opened, decision.number, messages_of(decision, place), on_step)

    def _transact(
        self,
        opened: _Open,
        number: int,
        messages: Iterator[AnswerMessage] | Sequence[AnswerMessage],
        on_step: Callable[[str], None] = lambda _: None,
    ) -> None:
        producer = opened.producer
        producer.begin()
        for message in messages:
            producer.send(opened.topic, message.value, message.key, message.headers)
        producer.flush()
        on_step("send")
        producer.commit(opened.topic, number, transactional_id_of(opened.stream))
        opened.committed = number

    def _opened(self, stream: str, topic: str) -> _Open:
        """A producer that has fenced all earlier ones, and the number of the newest batch that they committed."""
        client = client_arguments(self.settings)
        try:
            producer = TransactionalProducer(self._servers(), transactional_id_of(stream), ANSWER_TIMEOUT_S, client)
        except ValueError as error:  # an address that is not one
            raise AnswersAwayError(f"answers topic {topic!r}: {error}: check {SERVERS}") from error
        self._open = _Open(producer, stream, topic, None)
        producer.fence()
        self._open.committed = committed_batch(self._servers(), stream, topic, client)
        return self._open

    def _check_topic(self, decision: Decision, due: AnswersDue) -> None:
        """Reject a topic of the same name that is not the one that the stream checked."""
        found = self._described(due.topic, TopicOperation.WRITE)
        if found.id != due.topic_id and not self.accept_new_topic:
            raise ConflictError(
                f"the answers of batch {decision.number} are due on topic {due.topic!r} with id {due.topic_id}, and "
                f"the one at {self._servers()} has id {found.id}: name its broker with --answers-bootstrap-servers or "
                "IMAGESTREAM_ANSWERS_BOOTSTRAP_SERVERS; if the topic was recreated, start the stream with "
                "--accept-new-topic"
            )

    def _has_answers(self, decision: Decision, due: AnswersDue) -> bool:
        """Whether the topic itself has answers of the batch; for a group without an offset.

        Brokers delete the offset of a group that has not committed for `offsets.retention.minutes`, a week by default.
        """
        from kafka import TopicPartition

        wanted = {HEADER_SOURCE: f"/streams/{decision.stream}".encode(), HEADER_BATCH: str(decision.number).encode()}
        with closing(open_consumer(self._servers(), client_arguments(self.settings))) as consumer:
            ends = self._described(due.topic, TopicOperation.READ).ends
            places = {TopicPartition(due.topic, one): end for one, end in ends.items() if end}
            since = int((decision.decided_at - timedelta(seconds=CLOCKS_S)).timestamp() * 1000)
            first = consumer.offsets_for_times(dict.fromkeys(places, since)) if places else {}
            left = {one: end for one, end in places.items() if first.get(one) is not None}
            consumer.assign(list(left))
            for place in left:
                consumer.seek(place, first[place].offset)
            return any(wanted.items() <= dict(record.headers).items() for record in records_until(consumer, left))

    def _check_transactional_id(self, stream: str, topic: str) -> None:
        """Reject an id whose open transaction is not one of this stream, before it is aborted."""
        name = transactional_id_of(stream)
        others = topics_in_transaction(self._servers(), name, client_arguments(self.settings)) - {topic}
        if others:
            raise AnswersAwayError(
                f"answers topic {topic!r}: transactional id {name!r} is in use by another program, which has an open "
                f"transaction on topic {min(others)!r}: stop that program, or have it use another id"
            )

    def _registered(self, topic: str) -> int | None:
        """The id of the Avro schema in the schema registry; None without one."""
        registry = self.settings.schema_registry
        if registry is None:
            return None
        try:
            return register_schema(registry, f"{topic}-value", avro_text())
        except RegistryAwayError as error:
            raise AnswersAwayError(f"answers topic {topic!r}: {error}") from error

    def _servers(self) -> str:
        return answers_servers(self.settings)

    def _described(self, topic: str, right: TopicOperation) -> Topic:
        try:
            return describe_topic(self._servers(), topic, client_arguments(self.settings), right)
        except RefusedError:
            raise
        except ServiceError as error:
            raise AnswersAwayError(f"answers topic {topic!r}: {error}") from error

    def _report(self, state: AnswersState) -> None:
        self._state = state
        self.on_change(state)


def messages_of(decision: Decision, place: str) -> Iterator[AnswerMessage]:
    """The answers of a decided batch, read from its data files in parts of bounded size.

    Args:
        place: of the home's tables, a path or a URI.

    Raises:
        ServiceError: a file is missing or damaged.
    """
    due = decision.answers
    if due is None:
        return
    for table in due.tables:
        for file in decision.files.get(table, ()):
            try:
                for row in file_rows(table, f"{place}/{table}", file):
                    yield answer_message(table, row, due.format, due.schema_id)
            except (OSError, pa.ArrowException) as error:
                raise DamagedError(
                    f"batch {decision.number} was decided, but its file {table}/{file.path} cannot be read "
                    f"({type(error).__name__}): restore it into the home's tables"
                ) from error


def file_rows(table: str, place: str, file: DataFile) -> Iterator[dict[str, Any]]:
    """The columns that an answer is made from, of the rows of one data file, read in parts of bounded size."""
    fields = [*answer_fields(table), *(field for field in SCHEMAS[table][0] if field.name in HEADERS_OF[table])]
    schema = pa.schema([field for field in fields if field.name not in file.partition])
    with local_copy(place, file.path) as path:
        for batch in read_as(path, schema):
            for row in batch.to_pylist():
                yield row | file.partition


def _as_service_error(error: Exception, fenced: bool, stream: str, topic: str) -> ServiceError:
    """An error of Kafka as one line that names the setting to check; an AnswersAwayError if a retry may succeed."""
    from kafka import errors

    name, where = transactional_id_of(stream), f"answers topic {topic!r}"
    if fenced:
        return AnswersAwayError(
            f"{where}: transactional id {name!r} is in use by another process: stop the other stream of this home, or "
            "the program that uses this id"
        )
    grant = "grant it with `kafka-acls.sh --add --allow-principal User:NAME --resource-pattern-type prefixed"
    refused: dict[type[Exception], str] = {  # the first that matches
        errors.GroupAuthorizationFailedError: f"no permission for group {name!r}: {grant} --operation Read --group "
        "imagestream-`",
        errors.TransactionalIdAuthorizationFailedError: f"no permission for transactional id {name!r}: {grant} "
        "--operation Write --operation Describe --transactional-id imagestream-`",
        errors.AuthorizationError: f"no permission to read and write it ({error}): check IMAGESTREAM_KAFKA_USERNAME",
        errors.MessageSizeTooLargeError: f"an answer is too large for it ({error}): raise its max.message.bytes",
        errors.UnsupportedVersionError: f"its broker has no transactions ({error}): choose another one with {SERVERS}",
        errors.KafkaConfigurationError: f"its broker has no transactions ({error}): choose another one with {SERVERS}",
    }
    for kind, why in refused.items():
        if isinstance(error, kind):
            return RefusedError(f"{where}: {why}")
    return AnswersAwayError(
        f"{where}: its broker does not complete a transaction ({type(error).__name__}: {error}): check {SERVERS} and "
        "the broker's transaction.state.log.replication.factor"
    )
