"""The answers topic: the rows of every decided batch as messages, sent exactly once, together with the tables.

Whoever applies a decision (the stream, or whatever finishes a batch that it left) sends its answers in one Kafka
transaction, which also commits the number of the batch as the offset of a consumer group. So readers of committed
messages see all answers of a batch or none, and a process that applies the decision again knows whether they were sent:

    1. init      a producer under the stream's transactional id: what an earlier one left open is aborted or completed,
                 and that one is fenced, so that it cannot commit any more
    2. look      at the group's offset: the batch, or a later one, is out; then there is nothing to do
    3. send      the rows of the data files that the decision names, then the number as the group's offset
    4. commit

1 and 2 are left out while this process has the only producer: if another one had sent anything, the commit would fail.
Whatever fails, the producer is given up and 1 begins again: the outcome of the failed transaction is known after it.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from random import uniform
from time import monotonic
from typing import Any

import pyarrow as pa

from producer.message import HEADER_SOURCE
from streaming.errors import ConfigurationError, ConflictError, DamagedError, ServiceError, UnavailableError
from streaming.pipeline.answer_message import HEADER_BATCH, AnswerMessage, answer_fields, answer_message
from streaming.pipeline.decisions import AnswersDue, Decision
from streaming.platform.broker import bootstrap_servers as home_servers
from streaming.platform.kafka_client import connect
from streaming.platform.kafka_probe import RefusedError
from streaming.platform.kafka_security import client_arguments
from streaming.platform.topic import Right, Subscription, Topic, describe_topic
from streaming.settings import Settings
from streaming.storage.files import DataFile, at_hand, conformed, read_batches
from streaming.storage.tables import SCHEMAS

TABLES = {"predictions": ("predictions",), "quarantine": ("quarantine",), "both": ("predictions", "quarantine")}
TRANSACTION_TIMEOUT_MS = 60_000  # after which the broker aborts what a dead process left open
CONNECT_TIMEOUT_S = 10.0
ANSWER_TIMEOUT_S = 15.0  # for one request, with its retries
BATCH_BYTES = 256 * 1024
RETRY_MS = 20  # the broker may still be completing the transaction before
IN_FLIGHT = 5_000  # messages that are sent before the first of them is acknowledged
TRIES = 6  # to send the answers of a batch, while other processes fence this one
FENCED_S = (0.2, 1.0)  # a time between these is waited, so that one of two processes gets through
CLOCKS_S = 600.0  # by which the clocks of a broker and of a stream may differ
SCAN_TIMEOUT_S = 60.0
SERVERS = "--answers-bootstrap-servers (IMAGESTREAM_ANSWERS_BOOTSTRAP_SERVERS)"
HEADERS_OF = {"predictions": (), "quarantine": ("headers",)}  # columns that an answer's headers are made from


class AnswersAwayError(UnavailableError):
    """The broker for answers does not answer, so that a batch is not whole yet; asked again later, it may."""


@dataclass(frozen=True)
class Sent:
    """What is known about the answers of a stream.

    Attributes:
        batch: the newest batch whose answers are out; None before the first.
        at: when they were committed, in seconds since 1970.
        messages: answers of that batch.
        backlog: answers of a decided batch that are not out yet.
    """

    topic: str
    batch: int | None = None
    at: float | None = None
    messages: int = 0
    backlog: int = 0


@dataclass
class _Open:
    """A producer that nobody has fenced yet, as far as is known."""

    producer: Any
    stream: str
    topic: str
    committed: int | None  # the newest batch that is out


@dataclass
class AnswersTopic:
    """Sends the answers of one stream; used by one thread at a time. Connects when there is something to send.

    Args:
        accept_new_topic: send answers that are due to a topic that was made again under the same name.
        on_change: called with what is known whenever it changes.

    Attributes:
        due: what the stream records in its decisions; None without an answers topic.
    """

    settings: Settings
    accept_new_topic: bool = False
    on_change: Callable[[Sent], None] = lambda _: None
    due: AnswersDue | None = None
    _open: _Open | None = field(default=None, init=False)
    _sent: Sent | None = field(default=None, init=False)

    def prepare(self, reads: Subscription) -> None:
        """Check the answers topic before a stream starts; it is made if it is not there.

        Args:
            reads: the topics of images.

        Raises:
            ServiceError: it is a topic of images, or the broker does not answer or does not let us use it.
        """
        name = self.settings.answers_topic
        if name is None:
            return
        if reads.includes(name):
            raise ConfigurationError(
                f"--answers-topic: {name!r} is a topic that the stream reads images from: choose another name"
            )
        topics = [self._described(name, right) for right in (Right.WRITE, Right.READ)]
        self.due = AnswersDue(name, topics[0].id, TABLES[self.settings.answers])

    def begin(self, stream: str, number: int) -> None:
        """Fence earlier producers of the stream, and commit a first transaction, without a message.

        Args:
            number: the newest whole batch; its answers are out, or were not due.

        Raises:
            ServiceError: this user may not use transactions or the group; an AnswersAwayError where the broker does not
                complete a transaction, another process fences this one, or the topic has later batches.
        """
        if self.due is None:
            return
        topic = self.due.topic

        def commit() -> None:
            opened = self._opened(stream, topic)
            if opened.committed is not None and opened.committed > number:
                raise AnswersAwayError(
                    f"answers topic {topic!r} has batch {opened.committed} of this stream, and the tables end with "
                    f"batch {number}: another process runs the stream, or the home was restored from an older copy, "
                    "which needs another --answers-topic"
                )
            self._transact(opened, number, ())

        self._until_not_fenced(commit, stream, topic)
        self._tell(Sent(topic, number))

    def send(self, decision: Decision, place: str, on_step: Callable[[str], None] = lambda _: None) -> None:
        """Send the answers of a decided batch, unless they are out.

        Args:
            place: of the home's tables, a path or a URI.
            on_step: called with "send" when all are sent and none is committed, and with "answers" when they are out.

        Raises:
            ServiceError: the broker refuses them, or the data files cannot be read; an AnswersAwayError where the
                broker does not answer.
        """
        due = decision.answers
        if due is None:
            return
        rows = sum(file.rows for table in due.tables for file in decision.files.get(table, ()))
        before = self._sent if self._sent is not None and self._sent.topic == due.topic else Sent(due.topic)
        self._tell(replace(before, backlog=rows))
        self._until_not_fenced(lambda: self._send(decision, due, place, on_step), decision.stream, due.topic)
        self._tell(Sent(due.topic, decision.number, datetime.now(UTC).timestamp(), rows))
        on_step("answers")

    def close(self) -> None:
        """Give up the producer; a transaction that is open is aborted by the next one, or by the broker in time."""
        opened, self._open = self._open, None
        if opened is not None:
            from kafka.errors import KafkaError

            opened.producer._sender.force_close()  # what is under way belongs to a transaction that nobody commits
            with suppress(KafkaError):
                opened.producer.close(timeout=1)

    def _until_not_fenced(self, send: Callable[[], None], stream: str, topic: str) -> None:
        from kafka.errors import KafkaError

        for attempt in range(1, TRIES + 1):
            try:
                send()
            except BaseException as error:
                fenced = _is_fenced(error, self._open)
                self.close()
                if not isinstance(error, KafkaError):
                    raise
                if not fenced or attempt == TRIES:
                    raise _explained(error, fenced, stream, topic) from error
            else:
                return
            threading.Event().wait(uniform(*FENCED_S))  # noqa: S311  no secret

    def _send(self, decision: Decision, due: AnswersDue, place: str, on_step: Callable[[str], None]) -> None:
        opened = self._open
        if opened is None or (opened.stream, opened.topic) != (decision.stream, due.topic):
            self.close()
            self._check_topic(decision, due)
            opened = self._opened(decision.stream, due.topic)
            if opened.committed is None and self._is_there(decision, due):
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
        from kafka import TopicPartition
        from kafka.structs import OffsetAndMetadata

        producer, topic = opened.producer, opened.topic
        producer.begin_transaction()
        under_way: list[Any] = []
        for message in messages:
            under_way.append(producer.send(topic, message.value, message.key, message.headers))
            if len(under_way) >= IN_FLIGHT:
                _settle(under_way)
        _settle(under_way)
        on_step("send")
        # By the results and not by the public methods, which wait for ever for a broker that has gone.
        transaction = producer._transaction_manager
        offsets = {TopicPartition(topic, 0): OffsetAndMetadata(number, "", -1)}
        _await(producer, transaction.send_offsets_to_transaction(offsets, transactional_id_of(opened.stream)))
        _await(producer, transaction.begin_commit())
        opened.committed = number

    def _opened(self, stream: str, topic: str) -> _Open:
        """A producer that has fenced all earlier ones, and what they have committed."""
        from kafka import KafkaProducer

        try:
            producer = connect(
                KafkaProducer,
                bootstrap_servers=self._servers(),
                client_id="imagestream-answers",
                transactional_id=transactional_id_of(stream),
                transaction_timeout_ms=TRANSACTION_TIMEOUT_MS,
                acks="all",
                batch_size=BATCH_BYTES,
                retry_backoff_ms=RETRY_MS,
                bootstrap_timeout_ms=int(CONNECT_TIMEOUT_S * 1000),
                max_block_ms=int(ANSWER_TIMEOUT_S * 1000),
                request_timeout_ms=int(ANSWER_TIMEOUT_S * 1000 / 2),
                delivery_timeout_ms=int(ANSWER_TIMEOUT_S * 1000),
                **client_arguments(self.settings),
            )
        except ValueError as error:  # an address that is not one
            raise AnswersAwayError(f"answers topic {topic!r}: {error}: look at {SERVERS}") from error
        self._open = _Open(producer, stream, topic, None)
        producer.init_transactions()
        self._open.committed = committed_batch(self._servers(), stream, topic, client_arguments(self.settings))
        return self._open

    def _check_topic(self, decision: Decision, due: AnswersDue) -> None:
        """The answers go to the topic that the stream had checked, wherever this process finds one of its name."""
        found = self._described(due.topic, Right.WRITE)
        if found.id != due.topic_id and not self.accept_new_topic:
            raise ConflictError(
                f"the answers of batch {decision.number} are due on topic {due.topic!r} with id {due.topic_id}, and "
                f"the one at {self._servers()} has id {found.id}: name its broker with --answers-bootstrap-servers or "
                "IMAGESTREAM_ANSWERS_BOOTSTRAP_SERVERS; if the topic was made again, start the stream with "
                "--accept-new-topic"
            )

    def _is_there(self, decision: Decision, due: AnswersDue) -> bool:
        """Whether answers of the batch are in the topic itself, where the group has no offset.

        A broker forgets offsets that nobody has committed for a week.
        """
        from kafka import TopicPartition

        wanted = {HEADER_SOURCE: f"/streams/{decision.stream}".encode(), HEADER_BATCH: str(decision.number).encode()}
        with closing(open_consumer(self._servers(), client_arguments(self.settings))) as consumer:
            ends = self._described(due.topic, Right.READ).ends
            places = {TopicPartition(due.topic, one): end for one, end in ends.items() if end}
            since = int((decision.decided_at - timedelta(seconds=CLOCKS_S)).timestamp() * 1000)
            first = consumer.offsets_for_times(dict.fromkeys(places, since)) if places else {}
            left = {one: end for one, end in places.items() if first.get(one) is not None}
            consumer.assign(list(left))
            for place in left:
                consumer.seek(place, first[place].offset)
            give_up = monotonic() + SCAN_TIMEOUT_S
            while left := {one: end for one, end in left.items() if consumer.position(one) < end}:
                if monotonic() > give_up:
                    raise AnswersAwayError(
                        f"the answers topic {due.topic!r} cannot be read to its end: a transaction of another program "
                        "may be open there"
                    )
                for records in consumer.poll(timeout_ms=500).values():
                    if any(wanted.items() <= dict(record.headers).items() for record in records):
                        return True
        return False

    def _servers(self) -> str:
        return answers_servers(self.settings)

    def _described(self, topic: str, right: Right) -> Topic:
        try:
            return describe_topic(self._servers(), topic, client_arguments(self.settings), right)
        except RefusedError:
            raise
        except ServiceError as error:
            raise AnswersAwayError(f"answers topic {topic!r}: {error}") from error

    def _tell(self, sent: Sent) -> None:
        self._sent = sent
        self.on_change(sent)


def answers_servers(settings: Settings) -> str:
    """The brokers of the answers topic: those given for it, or else those of the images.

    Raises:
        AnswersAwayError: none were given, and the home's broker is not running.
    """
    if settings.answers_bootstrap_servers:
        return settings.answers_bootstrap_servers
    try:
        return home_servers(settings)
    except ServiceError as error:
        raise AnswersAwayError(f"answers topic: {error}") from error


def transactional_id_of(stream: str) -> str:
    """The transactional id of a stream, by its id; and the group whose offset is the newest batch that is out."""
    return f"imagestream-{stream}"


def committed_batch(servers: str, stream: str, topic: str, client: Mapping[str, Any]) -> int | None:
    """The newest batch of a stream whose answers are out; None if the broker knows of none.

    Raises:
        kafka.errors.KafkaError, ServiceError: the broker does not answer, or does not let us.
    """
    from kafka import TopicPartition

    with closing(open_consumer(servers, client, transactional_id_of(stream))) as consumer:
        offset: int | None = consumer.committed(TopicPartition(topic, 0), timeout_ms=int(ANSWER_TIMEOUT_S * 1000))
    return offset


def open_consumer(servers: str, client: Mapping[str, Any], group: str | None = None) -> Any:
    """A consumer of committed messages; an offset that is not there any more is an error."""
    from kafka import KafkaConsumer

    return connect(
        KafkaConsumer,
        bootstrap_servers=servers,
        group_id=group,
        isolation_level="read_committed",  # also of the group's offset: one that is being committed is waited for
        enable_auto_commit=False,
        auto_offset_reset="none",
        bootstrap_timeout_ms=int(CONNECT_TIMEOUT_S * 1000),
        **client,
    )


def messages_of(decision: Decision, place: str) -> Iterator[AnswerMessage]:
    """The answers of a decided batch, from its data files, a bounded part of a file at a time.

    Args:
        place: of the home's tables, a path or a URI.

    Raises:
        ServiceError: a file is missing or damaged.
    """
    for table in decision.answers.tables if decision.answers else ():
        for file in decision.files.get(table, ()):
            try:
                yield from file_messages(table, f"{place}/{table}", file)
            except (OSError, pa.ArrowException) as error:
                raise DamagedError(
                    f"batch {decision.number} was decided, but its file {table}/{file.path} cannot be read "
                    f"({type(error).__name__}): restore it into the home's tables"
                ) from error


def file_messages(table: str, place: str, file: DataFile) -> Iterator[AnswerMessage]:
    """The answers of one data file of a table, a bounded part of the file at a time."""
    fields = answer_fields(table) + [field for field in SCHEMAS[table][0] if field.name in HEADERS_OF[table]]
    schema = pa.schema([field for field in fields if field.name not in file.partition])
    with at_hand(place, file.path) as path:
        for batch in read_batches(path, schema.names):
            for row in conformed(batch, schema).to_pylist():
                yield answer_message(table, row | file.partition)


def _settle(under_way: list[Any]) -> None:
    for one in under_way:
        one.get(ANSWER_TIMEOUT_S)
    under_way.clear()


def _await(producer: Any, result: Any) -> None:
    from kafka.errors import KafkaTimeoutError

    producer._sender.wakeup()
    if not result.wait(ANSWER_TIMEOUT_S * 1000):
        raise KafkaTimeoutError(f"no answer for {ANSWER_TIMEOUT_S:g} s")


def _is_fenced(error: BaseException, opened: _Open | None) -> bool:
    """Whether another producer with our transactional id was opened."""
    from kafka.errors import InvalidProducerEpochError, ProducerFencedError

    last = opened.producer._transaction_manager.last_error if opened is not None else None
    return any(isinstance(one, ProducerFencedError | InvalidProducerEpochError) for one in (error, last))


def _explained(error: Exception, fenced: bool, stream: str, topic: str) -> ServiceError:
    """What Kafka said in one line, with the setting to look at; an AnswersAwayError where it may pass."""
    from kafka import errors

    name, where = transactional_id_of(stream), f"answers topic {topic!r}"
    if fenced:
        return AnswersAwayError(
            f"{where}: transactional id {name!r} is in use by another process again and again: stop the other stream "
            "of this home, or the program that uses this id"
        )
    grant = "grant it with `kafka-acls.sh --add --allow-principal User:NAME --resource-pattern-type prefixed"
    refused: dict[type[Exception], str] = {  # the first that fits
        errors.GroupAuthorizationFailedError: f"no right to group {name!r}: {grant} --operation Read --group "
        "imagestream-`",
        errors.TransactionalIdAuthorizationFailedError: f"no right to transactional id {name!r}: {grant} --operation "
        "Write --operation Describe --transactional-id imagestream-`",
        errors.AuthorizationError: f"no right to read and write it ({error}): look at IMAGESTREAM_KAFKA_USERNAME",
        errors.MessageSizeTooLargeError: f"an answer is too large for it ({error}): raise its max.message.bytes",
        errors.UnsupportedVersionError: f"its broker has no transactions ({error}): name another one with {SERVERS}",
    }
    for kind, why in refused.items():
        if isinstance(error, kind):
            return RefusedError(f"{where}: {why}")
    return AnswersAwayError(
        f"{where}: its broker completes no transaction ({type(error).__name__}: {error}): look at {SERVERS}, and at "
        "the broker's transaction.state.log.replication.factor"
    )
