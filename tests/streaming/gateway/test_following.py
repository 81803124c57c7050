"""Predictions as they are made over real HTTP: events that a client resumes, and uploads that get their own answer."""

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from threading import Event
from typing import Any

import httpx
import pytest
from kafka import KafkaConsumer, TopicPartition

from producer.sender import Sender
from streaming.follow import Answer
from streaming.gateway import following
from streaming.gateway.service import Broker
from streaming.settings import Settings
from tests.streaming.answered import BATCHES, EXPECTED, ROWS, begun, commit
from tests.streaming.gateway.test_gateway import (
    JPEG,
    JPEG_TYPE,
    MAX_BYTES,
    PATIENCE_S,
    append,
    image_id,
    prediction,
    served,
)
from tests.streaming.history import new_topic

STREAM = "/v1/predictions/stream"
UPLOADS = 50


@pytest.fixture
def home(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path)


@pytest.fixture
def no_broker() -> Broker:
    def send(_message: object) -> Any:
        raise AssertionError("nothing is published here")

    return Broker(MAX_BYTES, send, lambda: True, PATIENCE_S)


def events(client: httpx.Client, count: int, last: str | None = None, **parameters: str) -> list[tuple[str, Any]]:
    """(id, data) of the next events; then the connection is cut off."""
    headers = {} if last is None else {"Last-Event-ID": last}
    found: list[tuple[str, Any]] = []
    with client.stream("GET", STREAM, headers=headers, params=parameters) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        fields: dict[str, str] = {}
        for line in answer.iter_lines():
            if line:
                name, _, value = line.partition(": ")
                fields[name] = value
            elif "data" in fields:
                assert fields["event"] == "prediction"
                found.append((fields["id"], json.loads(fields["data"])))
                fields = {}
            if len(found) == count:
                break
    return found


@pytest.mark.parametrize("source", ["table", "json", "avro"])
def test_reconnecting_client_gets_each_prediction_once(
    source: str, home: Settings, no_broker: Broker, request: pytest.FixtureRequest
) -> None:
    """Events come from the table, or from an answers topic of several partitions with values of both formats."""
    on_topic = source != "table"
    broker = request.getfixturevalue("broker") if on_topic else None
    settings = begun(home, broker, **({"answers_format": source} if on_topic else {}))
    commit(settings, 1, 2)
    with served(settings, no_broker) as client, ThreadPoolExecutor(1) as pool:
        with client.stream("GET", STREAM) as cut_off:  # before the first event
            begin = next(line for line in cut_off.iter_lines() if line.startswith("id: ")).removeprefix("id: ")
        found = events(client, 1, after="earliest")
        found += events(client, 4, found[-1][0])
        coming = pool.submit(events, client, 2 * ROWS + 9, found[-1][0])  # more than there are
        commit(settings, 3, 3)
        commit(settings, 4, BATCHES)
        found += coming.result()
        while len(found) < len(EXPECTED):
            found += events(client, min(3, len(EXPECTED) - len(found)), found[-1][0])
        commit(settings, BATCHES + 1, BATCHES + 1)
        found += events(client, 2 * ROWS, found[-1][0])  # these come next, and nothing in between
        later = events(client, 6 * ROWS, begin)
    new = [(partition, offset) for offset in range(BATCHES * ROWS, (BATCHES + 1) * ROWS) for partition in (0, 1)]
    places = [(row["partition"], row["offset"]) for _, row in found]
    assert sorted(places) == sorted(EXPECTED + new)
    assert sorted(places[len(EXPECTED) :]) == sorted(new)
    assert {row["batch_id"] for _, row in later} == {*range(3, BATCHES + 2)}
    assert {row["table"] for _, row in found} == {"predictions"}
    assert {position.partition("/")[0] for position, _ in found} == {"topic" if on_topic else "table"}


def test_event_value_stays_in_its_data_lines() -> None:
    value = '{"label":"\u2028a"}\r\nid: 7\n\nevent: x\rdata'.encode() + b"\xff"
    assert following._event(Answer("topic/a/0:1", value)) == (
        'id: topic/a/0:1\nevent: prediction\ndata: {"label":"\u2028a"}\ndata: id: 7\ndata: \ndata: event: x\n'
        "data: data\ufffd\n\n"
    )


def test_invalid_position_and_excess_clients_are_refused(
    home: Settings, no_broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "MAX_STREAMS", 1)
    append(home, "predictions", [prediction(b"x", "cat")])
    with served(home, no_broker) as client:
        for position in ("x", "table/9/0", "topic/a/0:1"):
            answer = client.get(STREAM, headers={"Last-Event-ID": position})
            assert answer.status_code == 422, answer.text
            assert "position" in answer.json()["detail"]
        with client.stream("GET", STREAM):
            refused = client.get(STREAM)
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "5")
        until = time.monotonic() + PATIENCE_S
        while _status(client) != 200:  # until the first one is seen to be gone
            assert time.monotonic() < until


def _status(client: httpx.Client) -> int:
    with client.stream("GET", STREAM) as answer:
        return answer.status_code


@contextmanager
def scored(settings: Settings, servers: str, topic: str, missed: bytes) -> Iterator[None]:
    """A row for each message of the topic as it comes, but for one image; its label is the end of its image id."""
    over = Event()

    def score() -> None:
        with closing(KafkaConsumer(bootstrap_servers=servers)) as consumer:
            places = [TopicPartition(topic, one) for one in consumer.partitions_for_topic(topic)]
            consumer.assign(places)
            consumer.seek_to_beginning()
            while not over.is_set():
                found = [one for some in consumer.poll(timeout_ms=100).values() for one in some if one.value != missed]
                rows = [
                    prediction(one.value, one.key.decode()[-8:], one.offset)
                    | {"topic": topic, "partition": one.partition}
                    for one in found
                ]
                if rows:
                    append(settings, "predictions", rows)

    with ThreadPoolExecutor(1) as pool:
        scoring = pool.submit(score)
        try:
            yield
        finally:
            over.set()
        scoring.result()


def test_concurrent_waiting_uploads_each_get_their_prediction(home: Settings, broker: Settings) -> None:
    servers, topic = str(broker.bootstrap_servers), new_topic()
    images = [JPEG + str(number // 2).encode() for number in range(UPLOADS)]  # each image twice
    missed = JPEG + b"missed"

    def upload(client: httpx.Client, image: bytes, wait: object = 20) -> httpx.Response:
        return client.post("/images", params={"wait": str(wait)}, content=image, headers=JPEG_TYPE)

    with closing(Sender(servers, topic, delivery_timeout_s=PATIENCE_S)) as sender:
        kafka = Broker(MAX_BYTES, sender.send, sender.answers, PATIENCE_S)
        with served(home, kafka) as client, scored(home, servers, topic, missed), ThreadPoolExecutor(UPLOADS) as pool:
            got = list(pool.map(lambda image: upload(client, image), images))
            late = upload(client, missed, 0.5)
            refused = [upload(client, missed, wait) for wait in (-1, 31, "nan", "x")]
            described = client.get("/openapi.json").json()["paths"]
    places = set()
    for image, answer in zip(images, got, strict=True):
        assert answer.status_code == 200, answer.text
        found = answer.json()
        (row,) = found["predictions"]
        assert (found["image_id"], found["status"], row["label"]) == (
            image_id(image),
            "predicted",
            image_id(image)[-8:],
        )
        places.add((row["partition"], row["offset"]))
    assert len(places) == UPLOADS
    assert (late.status_code, late.json()["image_id"]) == (202, image_id(missed))
    assert {answer.status_code for answer in refused} == {422}
    assert refused[-1].json()["detail"] == "wait: expected seconds from 0 to 30, got 'x'"
    assert following.wait_parameter() in described["/images"]["post"]["parameters"]
    assert STREAM in described
