"""Live predictions over real HTTP: resumable server-sent events, and uploads that wait for their prediction."""

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
    TIMEOUT_S,
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
        raise AssertionError("no image may be published")

    return Broker(MAX_BYTES, send, lambda: True, TIMEOUT_S)


def events(client: httpx.Client, count: int, last: str | None = None, **parameters: str) -> list[tuple[str, Any]]:
    """(id, data) of the next events; then the connection is closed."""
    headers = {} if last is None else {"Last-Event-ID": last}
    found: list[tuple[str, Any]] = []
    with client.stream("GET", STREAM, headers=headers, params=parameters) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        fields: dict[str, str] = {}
        for line in response.iter_lines():
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
    """Events come from the table or from an answers topic with several partitions, in both formats."""
    on_topic = source != "table"
    broker = request.getfixturevalue("broker") if on_topic else None
    settings = begun(home, broker, **({"answers_format": source} if on_topic else {}))
    commit(settings, 1, 2)
    with served(settings, no_broker) as client, ThreadPoolExecutor(1) as pool:
        with client.stream("GET", STREAM) as response:  # closed before the first event
            begin = next(line for line in response.iter_lines() if line.startswith("id: ")).removeprefix("id: ")
        found = events(client, 1, after="earliest")
        found += events(client, 4, found[-1][0])
        later_events = pool.submit(events, client, 2 * ROWS + 9, found[-1][0])  # more than exist
        commit(settings, 3, 3)
        commit(settings, 4, BATCHES)
        found += later_events.result()
        while len(found) < len(EXPECTED):
            found += events(client, min(3, len(EXPECTED) - len(found)), found[-1][0])
        commit(settings, BATCHES + 1, BATCHES + 1)
        found += events(client, 2 * ROWS, found[-1][0])  # only the new events
        later = events(client, 6 * ROWS, begin)
    new = [(partition, offset) for offset in range(BATCHES * ROWS, (BATCHES + 1) * ROWS) for partition in (0, 1)]
    positions = [(row["partition"], row["offset"]) for _, row in found]
    assert sorted(positions) == sorted(EXPECTED + new)
    assert sorted(positions[len(EXPECTED) :]) == sorted(new)
    assert {row["batch_id"] for _, row in later} == {*range(3, BATCHES + 2)}
    assert {row["table"] for _, row in found} == {"predictions"}
    assert {id_.partition("/")[0] for id_, _ in found} == {"topic" if on_topic else "table"}


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
            response = client.get(STREAM, headers={"Last-Event-ID": position})
            assert response.status_code == 422, response.text
            assert "position" in response.json()["detail"]
        with client.stream("GET", STREAM):
            refused = client.get(STREAM)
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "5")
        deadline = time.monotonic() + TIMEOUT_S
        while _status(client) != 200:  # until the server notices that the first client has disconnected
            assert time.monotonic() < deadline


def _status(client: httpx.Client) -> int:
    with client.stream("GET", STREAM) as response:
        return response.status_code


@contextmanager
def scored(settings: Settings, servers: str, topic: str, unscored: bytes) -> Iterator[None]:
    """Write a row for each new message of the topic except one image; its label is the end of its image id."""
    ended = Event()

    def score() -> None:
        with closing(KafkaConsumer(bootstrap_servers=servers)) as consumer:
            consumer.assign([TopicPartition(topic, one) for one in consumer.partitions_for_topic(topic)])
            consumer.seek_to_beginning()
            while not ended.is_set():
                found = [
                    one for some in consumer.poll(timeout_ms=100).values() for one in some if one.value != unscored
                ]
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
            ended.set()
        scoring.result()


def test_concurrent_waiting_uploads_each_get_their_prediction(home: Settings, broker: Settings) -> None:
    servers, topic = str(broker.bootstrap_servers), new_topic()
    images = [JPEG + str(number // 2).encode() for number in range(UPLOADS)]  # each image twice
    unscored = JPEG + b"unscored"

    def upload(client: httpx.Client, image: bytes, wait: object = 20) -> httpx.Response:
        return client.post("/images", params={"wait": str(wait)}, content=image, headers=JPEG_TYPE)

    with closing(Sender(servers, topic, delivery_timeout_s=TIMEOUT_S)) as sender:
        kafka = Broker(MAX_BYTES, sender.send, sender.answers, TIMEOUT_S)
        with served(home, kafka) as client, scored(home, servers, topic, unscored), ThreadPoolExecutor(UPLOADS) as pool:
            got = list(pool.map(lambda image: upload(client, image), images))
            late = upload(client, unscored, 0.5)
            refused = [upload(client, unscored, wait) for wait in (-1, 31, "nan", "x")]
            described = client.get("/openapi.json").json()["paths"]
    positions = set()
    for image, response in zip(images, got, strict=True):
        assert response.status_code == 200, response.text
        found = response.json()
        (row,) = found["predictions"]
        assert (found["image_id"], found["status"], row["label"]) == (
            image_id(image),
            "predicted",
            image_id(image)[-8:],
        )
        positions.add((row["partition"], row["offset"]))
    assert len(positions) == UPLOADS
    assert (late.status_code, late.json()["image_id"]) == (202, image_id(unscored))
    assert {response.status_code for response in refused} == {422}
    assert refused[-1].json()["detail"] == "wait: expected seconds from 0 to 30, got 'x'"
    assert following.wait_parameter() in described["/images"]["post"]["parameters"]
    assert STREAM in described
