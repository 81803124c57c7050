"""Answers as messages and their topic: schema, content, refused topics, and exactly-once delivery."""

import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import jsonschema
import pytest
from kafka import KafkaProducer
from kafka.admin import KafkaAdminClient

from streaming.errors import ServiceError
from streaming.pipeline import answers_topic
from streaming.pipeline.answer_message import answer_message
from streaming.pipeline.answer_value import MAX_KEY_BYTES, json_schema
from streaming.pipeline.answers_reader import LAST_MESSAGES, transactional_id_of
from streaming.pipeline.answers_topic import AnswersTopic, messages_of
from streaming.pipeline.decisions import AnswersDue, Decision, Decisions
from streaming.pipeline.finish import Tables, apply, finish_decided
from streaming.platform import topic
from streaming.platform.jars import broker_classpath
from streaming.platform.java import find_java
from streaming.platform.kafka_node import HOST, KafkaNode, free_port
from streaming.platform.topic import Subscription
from streaming.platform.transactional_producer import TransactionalProducer
from streaming.settings import Settings
from streaming.storage.tables import SCHEMAS
from tests.conftest import CHECKOUT
from tests.faults.harness import check_answers, committed_answers
from tests.kafka_proxy import INIT_PRODUCER_ID, KafkaProxy, kafka_proxy
from tests.producer.topics import create_topic, delete_topic
from tests.streaming.history import NOON, begin_stream, decision_of, new_topic

BOTH = ("predictions", "quarantine")
BAD = {3, 4}


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    settings = Settings(home=tmp_path, topic=new_topic(), answers_topic=f"answers-{uuid4().hex[:8]}", answers="both")
    begin_stream(settings)
    return settings


@pytest.fixture
def connected(settings: Settings, broker: Settings) -> Settings:
    return settings.model_copy(update={"bootstrap_servers": broker.bootstrap_servers})


def decide(settings: Settings, number: int, due: AnswersDue | None) -> Decision:
    decision = decision_of(settings, number, {0: (10 * number - 10, 10 * number)}, bad=BAD)
    decision = replace(decision, answers=due, decided_at=datetime.now(UTC))
    assert Decisions(settings.place.store, settings.topic).decide(decision)
    return decision


def recreate_topic(settings: Settings) -> None:
    with closing(KafkaAdminClient(bootstrap_servers=settings.bootstrap_servers)) as admin:
        delete_topic(admin, str(settings.answers_topic))
    create_topic(str(settings.bootstrap_servers), str(settings.answers_topic))


def test_messages_match_the_published_schema(settings: Settings) -> None:
    assert json.loads((CHECKOUT / "docs" / "answers.schema.json").read_text()) == json_schema()
    validator = jsonschema.Draft202012Validator(json_schema(), format_checker=jsonschema.FormatChecker())
    decision = replace(decision_of(settings, 1, {0: (0, 10)}, bad=BAD), answers=AnswersDue("answers", "id", BOTH))
    messages = list(messages_of(decision, settings.place.tables))
    assert len(messages) == decision.input_rows == 10
    for message in messages:
        validator.validate(json.loads(message.value))


def test_message_has_the_row_cloudevents_headers_and_trace(settings: Settings) -> None:
    nulls: dict[str, Any] = dict.fromkeys(SCHEMAS["predictions"][0].names)
    trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    row = nulls | {
        "image_id": "ü", "topic": "images", "partition": 2, "offset": 7, "key": b"k" * (MAX_KEY_BYTES + 1),
        "label": "cat", "confidence": float("nan"), "top_k": [{"label": "cat", "probability": 0.75}], "scored_at": NOON,
        "query_id": "q", "batch_id": 9, "traceparent": trace,
    }  # fmt: skip
    message = answer_message("predictions", row)
    value, headers = json.loads(message.value), {name: text.decode() for name, text in message.headers}
    assert message.key == b"k" * MAX_KEY_BYTES
    assert (value["image_id"], value["offset"], value["label"], value["confidence"]) == ("ü", 7, "cat", None)
    assert (value["top_k"], value["scored_at"]) == (row["top_k"], "2024-05-06T12:00:00.000000Z")
    assert headers == {
        "ce_specversion": "1.0", "ce_type": "imagestream.prediction", "ce_source": "/streams/q", "ce_id": "images/2/7",
        "ce_subject": "ü", "ce_time": "2024-05-06T12:00:00.000000Z", "ce_dataschema": json_schema()["$id"],
        "ce_batch": "9", "content-type": "application/json", "traceparent": trace,
    }  # fmt: skip


def test_missing_file_of_a_batch_is_named(settings: Settings) -> None:
    decision = replace(decision_of(settings, 1, {0: (0, 10)}), answers=AnswersDue("answers", "id", BOTH))
    file = decision.files["predictions"][0].path
    Path(settings.place.table("predictions"), file).unlink()
    with pytest.raises(ServiceError, match=r"file predictions/.* cannot be read"):
        list(messages_of(decision, settings.place.tables))


def test_image_topic_is_refused_for_answers(settings: Settings) -> None:
    name = str(settings.answers_topic)
    for reads in (Subscription(("images", name)), Subscription(pattern="answers-.*")):
        with pytest.raises(
            ServiceError, match=f"--answers-topic: '{name}' is a topic that the stream reads images from"
        ):
            AnswersTopic(settings).prepare(reads)


JSON = answer_message("predictions", dict.fromkeys(SCHEMAS["predictions"][0].names))
AVRO = answer_message("predictions", dict.fromkeys(SCHEMAS["predictions"][0].names), "avro")
OTHER_VERSION = [*JSON.headers[:-1], ("ce_dataschema", b"urn:imagestream:answer:2")]
OLD_FIRST = [(b"x", [])] + [(JSON.value, JSON.headers)] * LAST_MESSAGES  # only the last messages are checked
REGISTRY = "http://127.0.0.1:1"


@pytest.mark.parametrize(
    ("messages", "options", "message"),
    [
        ([(b"x", [])], {}, r"a message that is not an answer \(offset 0 of partition 0\): choose another topic$"),
        (
            [(JSON.value, JSON.headers), (None, [("ce_type", b"x")])],
            {},
            r"a message that is not an answer \(offset 1 of partition 0\)",
        ),
        ([(JSON.value, OTHER_VERSION)], {}, "answers of schema 'urn:imagestream:answer:2', expected 'urn:.*:answer:1'"),
        (
            [(JSON.value, JSON.headers)],
            {"answers_format": "avro"},
            ".*'urn:imagestream:answer:1', expected 'urn:imagestream:answer-avro:1' .* or set --answers-format json$",
        ),
        (
            [(AVRO.value, AVRO.headers)],
            {},
            ".*'urn:imagestream:answer-avro:1', expected .* or set --answers-format avro$",
        ),
        (
            [(AVRO.value, AVRO.headers)],
            {"answers_format": "avro", "schema_registry": REGISTRY},
            "Avro records without the id of a schema registry .* topic or do not set --schema-registry$",
        ),
        (
            [(b"\0\0\0\0\1", AVRO.headers)],
            {"answers_format": "avro"},
            "Avro records with the id of a schema registry .* topic or set --schema-registry$",
        ),
        (OLD_FIRST, {}, None),
        ([(AVRO.value, AVRO.headers)], {"answers_format": "avro"}, None),
    ],
)
def test_topic_with_other_messages_is_refused(
    messages: list[tuple[bytes | None, list[Any]]], options: dict[str, str], message: str | None, connected: Settings
) -> None:
    settings = connected.model_copy(update=options)
    name = str(settings.answers_topic)
    create_topic(str(settings.bootstrap_servers), name)
    with closing(KafkaProducer(bootstrap_servers=settings.bootstrap_servers)) as producer:
        for value, headers in messages:
            producer.send(name, value, b"key", headers)
    answers = AnswersTopic(settings)
    if message is None:
        answers.prepare(Subscription(("images",)))
        return
    with pytest.raises(ServiceError, match=f"^--answers-topic: '{name}' has {message}") as caught:
        answers.prepare(Subscription(("images",)))
    assert "\n" not in str(caught.value)


def test_transactional_id_in_use_by_another_program_is_refused(connected: Settings) -> None:
    stream, elsewhere = uuid4().hex, f"elsewhere-{uuid4().hex[:8]}"
    create_topic(str(connected.bootstrap_servers), elsewhere)
    other = TransactionalProducer(str(connected.bootstrap_servers), transactional_id_of(stream), 300, {})
    other.fence()
    other.begin()
    other.send(elsewhere, b"x", None, [])
    other.flush()
    with closing(AnswersTopic(connected)) as answers:
        answers.prepare(Subscription((connected.topic,)))
        with pytest.raises(
            ServiceError, match=f"'imagestream-{stream}' is in use by another program, .* '{elsewhere}'"
        ):
            answers.begin(stream, 0)
        other.commit(elsewhere, 0, "another-group")  # fails if it was aborted
        other.abandon()
        answers.begin(stream, 0)


@contextmanager
def proxied_broker(proxy: KafkaProxy, folder: Path, jars: Path, **properties: str) -> Iterator[str]:
    """The address of a broker that clients reach only through the proxy."""
    address = f"{HOST}:{proxy.server_address[1]}"
    proxy.broker = (HOST, free_port())
    extra = {name.replace("_", "."): value for name, value in properties.items()}
    extra["advertised.listeners"] = f"PLAINTEXT://{address}"
    node = KafkaNode(folder, proxy.broker[1], find_java(jars.parent), broker_classpath(jars), extra)
    node.configure()
    node.format_storage()
    process = node.launch()
    try:
        node.await_ready(process, 300)
        yield address
    finally:
        process.terminate()
        process.wait(300)


@pytest.mark.parametrize(
    ("hidden", "replicas", "message"),
    [
        (None, "3", "its broker does not complete a transaction .* transaction.state.log.replication.factor"),
        (
            INIT_PRODUCER_ID,
            "1",
            "its broker has no transactions .* choose another one with --answers-bootstrap-servers",
        ),
    ],
)
def test_broker_without_transactions_is_reported_in_one_line(
    hidden: int | None, replicas: str, message: str, settings: Settings, jars_dir: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A broker whose transaction log needs more replicas than exist, and one without support for transactions."""
    monkeypatch.setattr(answers_topic, "ANSWER_TIMEOUT_S", 3.0)
    (folder := tmp_path / "kafka").mkdir()
    with (
        kafka_proxy() as proxy,
        proxied_broker(proxy, folder, jars_dir, transaction_state_log_replication_factor=replicas) as address,
        closing(AnswersTopic(settings.model_copy(update={"answers_bootstrap_servers": address}))) as answers,
    ):
        proxy.hidden = hidden
        answers.prepare(Subscription((settings.topic,)))
        with pytest.raises(ServiceError, match=f"^answers topic '{settings.answers_topic}': {message}") as caught:
            answers.begin("stream", 0)
    assert "\n" not in str(caught.value)


def test_missing_broker_is_reported_in_one_line(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topic, "TIMEOUT_MS", 1000)
    unreachable = settings.model_copy(update={"answers_bootstrap_servers": "127.0.0.1:1"})
    with pytest.raises(ServiceError, match="answers topic .*: no Kafka broker answers at 127.0.0.1:1"):
        AnswersTopic(unreachable).prepare(Subscription(("images",)))


def test_answers_are_sent_once_after_lost_offsets_and_a_recreated_topic(
    connected: Settings,
) -> None:
    settings, tables = connected, Tables(connected.place.tables)
    with closing(AnswersTopic(settings)) as answers:
        answers.prepare(Subscription((settings.topic,)))
        for number in (1, 2):
            apply(decide(settings, number, answers.due), tables, fresh=True, answers=answers)
        third = decide(settings, 3, answers.due)
        answers.send(third, tables.place)
    values = [message.value for message in committed_answers(settings)]
    assert len({*values}) == len(values) == 30

    with closing(AnswersTopic(settings)) as answers:
        answers.prepare(Subscription((settings.topic,)))
        with pytest.raises(ServiceError, match="has batch 3 of this stream, and the tables end with batch 2"):
            answers.begin(third.stream, 2)

    with closing(KafkaAdminClient(bootstrap_servers=settings.bootstrap_servers)) as admin:
        admin.delete_groups([transactional_id_of(third.stream)])
    finish_decided(settings, settings.topic, tables)
    check_answers(settings)

    fourth = decide(settings, 4, third.answers)
    recreate_topic(settings)
    with pytest.raises(
        ServiceError, match="answers of batch 4 are due on topic .* was recreated, start the stream with"
    ):
        finish_decided(settings, settings.topic, tables)
    with closing(AnswersTopic(settings, accept_new_topic=True)) as answers:
        assert finish_decided(settings, settings.topic, tables, answers)
    assert len(committed_answers(settings)) == fourth.input_rows
