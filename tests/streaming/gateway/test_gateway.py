"""The gateway over real HTTP with a real broker and real tables: accepted and refused requests, and responses."""

import hashlib
import os
import re
import signal
import socket
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from pathlib import Path
from time import monotonic
from typing import Any
from urllib.parse import quote

import httpx
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as examples

from producer.message import HEADER_LABEL, HEADER_SOURCE, HEADER_TRACEPARENT, read_headers
from producer.sender import Sender
from streaming.cli import commands  # noqa: F401  registers every command
from streaming.cli.app import run as run_command
from streaming.gateway.app import create_app
from streaming.gateway.lookup import Lookup
from streaming.gateway.serve import listen, make_server
from streaming.gateway.service import Broker
from streaming.platform.broker import bootstrap_servers, running_broker
from streaming.settings import Settings
from streaming.storage.tables import SCHEMAS, Table
from tests.conftest import suspend
from tests.producer.topics import messages

JPEG = b"\xff\xd8\xff"
JPEG_TYPE = {"Content-Type": "image/jpeg"}
KEY = "a key of thirty-two characters.."
MAX_BYTES = 200_000
TIMEOUT_S, SHORT_TIMEOUT_S = 30.0, 3.0  # for responsive and unresponsive brokers
NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)


def check_problem(response: httpx.Response, code: int) -> str:
    """Check that an error is in the format of RFC 9457; returns its detail, one line."""
    assert (response.status_code, response.headers["Content-Type"]) == (code, "application/problem+json"), response.text
    found = response.json()
    assert (found["type"], found["status"], found["title"]) == ("about:blank", code, HTTPStatus(code).phrase)
    assert "\n" not in found["detail"]
    return str(found["detail"])


def image_id(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@contextmanager
def served(settings: Settings, broker: Broker, key: str | None = None) -> Iterator[httpx.Client]:
    """A client of a gateway in a thread of this process, behind a real socket."""
    with listen("127.0.0.1", 0) as listener:
        server = make_server(create_app(settings, broker, [key] if key else []))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            limits = httpx.Limits(max_connections=200)
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            with httpx.Client(base_url=url, timeout=300, limits=limits) as client:
                yield client
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def sender(broker: Settings, topic: str) -> Iterator[Sender]:
    sender = Sender(bootstrap_servers(broker), topic, delivery_timeout_s=TIMEOUT_S)
    yield sender
    sender.close()


@pytest.fixture(scope="module")
def kafka(sender: Sender) -> Broker:
    return Broker(MAX_BYTES, sender.send, sender.answers, TIMEOUT_S)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return Settings(home=tmp_path_factory.mktemp("gateway"))


@pytest.fixture(scope="module")
def client(home: Settings, kafka: Broker) -> Iterator[httpx.Client]:
    with served(home, kafka) as client:
        yield client


def message_at(found: list[Any], response: dict[str, Any]) -> Any:
    """The message at the partition and offset in a response."""
    (message,) = [one for one in found if (one.partition, one.offset) == (response["partition"], response["offset"])]
    return message


def append(settings: Settings, table: str, rows: list[dict[str, Any]]) -> None:
    schema = SCHEMAS[table][0]
    nulls: dict[str, Any] = dict.fromkeys(schema.names)
    data = pa.Table.from_pylist([nulls | row for row in rows], schema)
    Table(settings.place.tables, table).append(data, uuid.uuid4().hex, 1)


def prediction(data: bytes, label: str, offset: int = 0, scored_at: datetime = NOW) -> dict[str, Any]:
    return {
        "image_id": image_id(data),
        "topic": "images",
        "partition": 0,
        "offset": offset,
        "label": label,
        "confidence": 0.75,
        "top_k": [{"label": label, "probability": 0.75}, {"label": "other", "probability": 0.25}],
        "model_version": 3,
        "scored_at": scored_at,
        "date": scored_at.date(),
    }


def test_concurrent_uploads_are_at_the_returned_offsets(client: httpx.Client, broker: Settings, topic: str) -> None:
    images = [JPEG + str(number).encode() + os.urandom(2_000 + 900 * number) for number in range(200)]

    def upload(number: int) -> httpx.Response:
        if number % 2:
            return client.post("/v1/images", files={"file": ("a.jpg", images[number])}, data={"label": f"odd {number}"})
        return client.post(f"/v1/images?label=even+{number}", content=images[number], headers=JPEG_TYPE)

    with ThreadPoolExecutor(200) as pool:
        responses = list(pool.map(upload, range(200)))
    assert {response.status_code for response in responses} == {202}
    found = {(one.partition, one.offset): one for one in messages(bootstrap_servers(broker), topic)}
    for number, (image, response) in enumerate(zip(images, map(httpx.Response.json, responses), strict=True)):
        message = found[response["partition"], response["offset"]]
        assert (response["topic"], response["image_id"], message.key.decode()) == (
            topic,
            image_id(image),
            image_id(image),
        )
        assert responses[number].headers["Location"] == f"/v1/predictions/{image_id(image)}"
        assert message.value == image
        assert read_headers(message.headers).label == f"{'odd' if number % 2 else 'even'} {number}"


def test_trace_and_content_type_are_published_with_the_image(
    client: httpx.Client, broker: Settings, topic: str
) -> None:
    trace = f"00-{'a' * 32}-{'b' * 16}-01"
    response = client.post("/images", content=JPEG + b"traced", headers=JPEG_TYPE | {"traceparent": trace})
    headers = dict(message_at(messages(bootstrap_servers(broker), topic), response.json()).headers)
    assert headers[HEADER_TRACEPARENT].decode() == trace
    assert headers["content-type"] == b"image/jpeg"
    assert HEADER_LABEL not in headers
    assert headers[HEADER_SOURCE] == b"gateway"
    for invalid in ("x", f"00-{'A' * 32}-{'b' * 16}-01"):
        headers = JPEG_TYPE | {"traceparent": invalid}
        assert client.post("/images", content=JPEG + b"traced", headers=headers).status_code == 202


def test_file_name_of_an_upload_is_its_source(client: httpx.Client, broker: Settings, topic: str) -> None:
    named = client.post("/v1/images", files={"file": ("Käse 1.jpg", JPEG + b"named")})
    chosen = client.post("/v1/images?source=camera+7%2F1.jpg", content=JPEG + b"named", headers=JPEG_TYPE)
    found = messages(bootstrap_servers(broker), topic)
    sources = [read_headers(message_at(found, response.json()).headers).source for response in (named, chosen)]
    assert sources == ["Käse 1.jpg", "camera 7/1.jpg"]


def test_several_images_in_one_request_are_all_published_or_none(
    client: httpx.Client, broker: Settings, topic: str
) -> None:
    images = [JPEG + os.urandom(1_000 * (number + 1)) for number in range(5)]
    files = [("file", (f"{number}.jpg", image)) for number, image in enumerate(images)]
    before = len(messages(bootstrap_servers(broker), topic))
    for bad, code in ((("file", ("bad.txt", b"a text")), 415), (("file", ("large.jpg", JPEG + bytes(MAX_BYTES))), 413)):
        check_problem(client.post("/v1/images/batch", files=[*files, bad]), code)
    refused = client.post("/v1/images/batch", files=[("file", ("a.jpg", JPEG))] * 101)
    assert "Too many files" in check_problem(refused, 400)
    response = client.post("/v1/images/batch", files=files, data={"label": "cat"})
    assert response.status_code == 202, response.text
    found = messages(bootstrap_servers(broker), topic)
    assert len(found) == before + len(images)
    for number, (image, accepted) in enumerate(zip(images, response.json()["images"], strict=True)):
        message = message_at(found, accepted)
        assert (message.value, accepted["image_id"]) == (image, image_id(image))
        headers = read_headers(message.headers)
        assert (headers.source, headers.label) == (f"{number}.jpg", "cat")


def chunks(size: int) -> Iterator[bytes]:
    yield JPEG
    for _ in range(size // 1000):
        yield bytes(1000)


def form(name: str, content: bytes) -> dict[str, Any]:
    return {"files": {name: ("a.jpg", content)}}


@pytest.mark.parametrize(
    ("request_", "code", "detail"),
    [
        ({"content": JPEG + bytes(MAX_BYTES), "headers": JPEG_TYPE}, 413, "at most 200,000 bytes per image"),
        ({"content": chunks(MAX_BYTES * 50), "headers": JPEG_TYPE}, 413, "at most 200,000 bytes per image"),
        (form("file", JPEG + bytes(MAX_BYTES)), 413, "at most 200,000 bytes per image"),
        (form("file", JPEG + bytes(MAX_BYTES * 50)), 413, "at most 200,000 bytes per image"),
        ({"content": b"a text", "headers": JPEG_TYPE}, 415, "expected an image"),
        (form("file", b"a text"), 415, "expected an image"),
        ({"content": JPEG, "headers": {"Content-Type": "text/plain"}}, 415, "expected multipart/form-data"),
        ({"content": JPEG}, 415, "expected multipart/form-data"),
        ({"content": b"", "headers": JPEG_TYPE}, 400, "the upload is empty"),
        (form("file", b""), 400, "the upload is empty"),
        (form("image", JPEG), 422, "field file"),
        ({"content": JPEG, "headers": {"Content-Type": "multipart/form-data"}}, 400, "Missing boundary"),
        ({"content": JPEG, "headers": {"Content-Type": "multipart/form-data; boundary=x"}}, 400, "multipart body"),
        ({"files": {"file": ("a.jpg", JPEG), "b": ("b.jpg", JPEG)}}, 400, "Too many files"),
        (form("file", JPEG) | {"data": {"label": "x" * 201}}, 422, "expected 1 to 200 printable characters"),
        (form("file", JPEG) | {"data": {"label": "a\x00b"}}, 422, "expected 1 to 200 printable characters"),
        ({"content": JPEG, "headers": JPEG_TYPE, "params": {"label": "x" * 201}}, 422, "label: .*at most 200"),
        (
            {"content": JPEG, "headers": JPEG_TYPE, "params": {"source": "a\nb"}},
            422,
            "source: expected 1 to 1024 print",
        ),
        ({"files": {"file": ("a" * 1025, JPEG)}}, 422, "source: expected 1 to 1024 printable"),
        ({"content": JPEG, "headers": JPEG_TYPE | {"Origin": "https://elsewhere.test"}}, 403, "cross-origin requests"),
        ({"content": JPEG, "headers": JPEG_TYPE | {"Host": "elsewhere.test"}}, 403, "requests to localhost only"),
    ],
)
def test_invalid_upload_is_refused_in_one_line(
    client: httpx.Client, request_: dict[str, Any], code: int, detail: str
) -> None:
    response = client.post("/v1/images", **request_)
    assert re.search(detail, check_problem(response, code)), response.text


def test_endless_upload_is_refused_at_the_limit(client: httpx.Client) -> None:
    with socket.create_connection((client.base_url.host, client.base_url.port or 0), timeout=10) as connection:
        head = f"POST /images HTTP/1.1\r\nHost: 127.0.0.1:{client.base_url.port}\r\nContent-Type: image/jpeg\r\n"
        connection.sendall(head.encode() + b"Transfer-Encoding: chunked\r\n\r\n")
        for _ in range(MAX_BYTES // 0x10000 + 1):
            connection.sendall(b"10000\r\n" + bytes(0x10000) + b"\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")


def test_api_key_is_required(home: Settings, kafka: Broker) -> None:
    with served(home, kafka, KEY) as client:
        path = f"/predictions/{'0' * 64}"
        wrong = [{}, {"X-API-Key": KEY[:-1]}, {"X-API-Key": "ä" * 32}, {"Authorization": f"Basic {KEY}"}]
        for headers in [*wrong, {"Authorization": "Bearer x"}]:
            encoded = {name: value.encode() for name, value in headers.items()}
            response = client.get(path, headers=encoded)
            assert "expected the API key" in check_problem(response, 401)
            assert client.post("/images", content=JPEG, headers=JPEG_TYPE | encoded).status_code == 401
        for headers in ({"X-API-Key": KEY}, {"Authorization": f"Bearer {KEY}"}):
            assert client.get(path, headers=headers).status_code == 404
            assert client.post("/images", content=JPEG, headers=JPEG_TYPE | headers).status_code == 202
        other = {"X-API-Key": KEY, "Origin": "https://elsewhere.test"}
        assert client.post("/images", content=JPEG, headers=JPEG_TYPE | other).status_code == 403
        for public in ("/livez", "/healthz", "/readyz"):
            assert client.get(public).status_code == 200


@pytest.mark.parametrize(
    ("content", "arguments", "reason"),
    [
        (
            None,
            ["--host", "192.0.2.1"],
            "--host 192.0.2.1 gives other machines access: set IMAGESTREAM_GATEWAY_API_KEY",
        ),
        (None, ["--host", "::"], "--host :: gives other machines access"),
        (b"short", [], "expected at least 16 printable characters per line, got 5"),
        (b"\xff" * 40, [], "cannot be read"),
    ],
)
def test_unsafe_api_key_configuration_prevents_the_start(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    content: bytes | None,
    arguments: list[str],
    reason: str,
) -> None:
    if content is not None:
        (tmp_path / "key").write_bytes(content)
        monkeypatch.setenv("IMAGESTREAM_GATEWAY_API_KEY_FILE", str(tmp_path / "key"))
    with pytest.raises(SystemExit) as ended:
        run_command(["--home", str(tmp_path), "gateway", *arguments])
    err = capsys.readouterr().err
    assert (ended.value.code, err.count("\n")) == (2 if arguments else 1, 1)
    assert reason in err


def test_image_is_unknown_then_predicted_with_the_latest_row_first(client: httpx.Client, home: Settings) -> None:
    image = os.urandom(20)
    path = f"/v1/predictions/{image_id(image)}"
    assert "never published, or has not been scored" in check_problem(client.get(path), 404)

    later = NOW + timedelta(days=1)
    append(home, "predictions", [prediction(image, "cat", 7), prediction(b"another", "dog", 8)])
    append(home, "predictions", [prediction(image, "tiger", 9, later)])
    response = client.get(path, params={"wait": 5}).json()
    assert response["status"] == "predicted"
    assert [(row["label"], row["offset"]) for row in response["predictions"]] == [("tiger", 9), ("cat", 7)]
    assert response["predictions"][0]["top_k"] == [
        {"label": "tiger", "probability": 0.75},
        {"label": "other", "probability": 0.25},
    ]
    assert response["predictions"][0]["scored_at"] == later.isoformat().replace("+00:00", "Z")
    assert response["quarantined"] == []


def test_quarantined_image_is_returned_with_its_reason_without_bytes(client: httpx.Client, home: Settings) -> None:
    image = os.urandom(20)
    message = {"topic": "images", "partition": 1, "offset": 4, "value": image, "quarantined_at": NOW}
    failure = {"stage": "decode", "reason": "truncated", "detail": "it ends after 20 bytes"}
    append(home, "quarantine", [{"image_id": image_id(image)} | message | failure])
    response = client.get(f"/predictions/{image_id(image)}", params={"wait": 5}).json()
    assert (response["status"], response["predictions"]) == ("quarantined", [])
    (row,) = response["quarantined"]
    assert failure.items() <= row.items()
    assert "value" not in row


def test_waiting_request_is_answered_when_the_row_arrives(client: httpx.Client, home: Settings) -> None:
    image = os.urandom(20)
    with ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(client.get, f"/predictions/{image_id(image)}", params={"wait": 30}) for _ in range(8)]
        append(home, "predictions", [prediction(image, "cat")])
        responses = [one.result().json() for one in waiting]
    assert {response["predictions"][0]["label"] for response in responses} == {"cat"}


def test_lookup_works_after_compaction_and_vacuum(tmp_path: Path) -> None:
    from deltalake import DeltaTable

    settings = Settings(home=tmp_path)
    for number in range(3):
        append(settings, "predictions", [prediction(b"%d" % number, "cat", number)])
    lookup = Lookup(settings.place)
    assert lookup.find(image_id(b"1"))
    table = DeltaTable(settings.place.table("predictions"))
    table.optimize.compact()
    table.vacuum(0, dry_run=False, enforce_retention_duration=False)
    for number in range(3):
        assert [row["offset"] for row in lookup.find(image_id(b"%d" % number)).rows["predictions"]] == [number]
    lookup.close()


def test_image_is_found_by_the_publishers_id(client: httpx.Client, home: Settings) -> None:
    for id_ in ("camera 7/2026-03-01 12:00.jpg", "?a=1&b", "Käse", "100%"):
        append(home, "predictions", [prediction(b"", "cat") | {"image_id": id_}])
        response = client.get(f"/v1/predictions/{quote(id_, safe='')}", params={"wait": 5})
        assert (response.status_code, response.json()["image_id"]) == (200, id_)


@pytest.mark.parametrize("path", [f"/v1/predictions/{'A' * 1025}", f"/v1/predictions/{'0' * 64}?wait=31"])
def test_invalid_query_is_refused_in_one_line(client: httpx.Client, path: str) -> None:
    check_problem(client.get(path), 422)


@pytest.mark.parametrize(("method", "path", "code"), [("GET", "/v1/images", 405), ("GET", "/v1", 404)])
def test_unknown_route_is_reported_as_a_problem(client: httpx.Client, method: str, path: str, code: int) -> None:
    check_problem(client.request(method, path), code)


def test_unversioned_routes_work_and_name_their_successors(client: httpx.Client) -> None:
    unknown = client.get(f"/predictions/{'0' * 64}")
    assert (unknown.status_code, unknown.json()) == (404, {"image_id": "0" * 64, "status": "unknown"})
    accepted, refused = client.post("/images", content=JPEG, headers=JPEG_TYPE), client.post("/images", content=b"")
    assert (accepted.status_code, set(accepted.json())) == (202, {"image_id", "topic", "partition", "offset"})
    assert check_problem(refused, 415)
    for response, successor in ((unknown, f"predictions/{'0' * 64}"), (accepted, "images"), (refused, "images")):
        assert re.fullmatch(r"@\d+", response.headers["Deprecation"])
        assert response.headers["Link"] == f'</v1/{successor}>; rel="successor-version"'
    described = client.get("/openapi.json").json()["paths"]
    old = {path for path, operations in described.items() for one in operations.values() if one.get("deprecated")}
    assert old == {"/images", "/predictions/{image_id}", "/healthz"}
    assert "Deprecation" not in client.get(f"/v1/predictions/{'0' * 64}").headers


def test_unresponsive_broker_is_reported_until_it_recovers(home: Settings, fragile_broker: Settings) -> None:
    state = running_broker(fragile_broker.model_copy(update={"bootstrap_servers": None}))
    assert state is not None
    sender = Sender(state.address, f"gateway-{uuid.uuid4().hex[:8]}", delivery_timeout_s=SHORT_TIMEOUT_S)
    with closing(sender), served(home, Broker(MAX_BYTES, sender.send, sender.answers, SHORT_TIMEOUT_S)) as client:
        assert client.post("/images", content=JPEG + b"before", headers=JPEG_TYPE).status_code == 202
        assert client.get("/readyz").status_code == 200
        suspend(state.pid)
        try:
            response = client.post("/images", content=JPEG + b"during", headers=JPEG_TYPE)
            assert (response.status_code, response.headers["Retry-After"]) == (503, "5")
            assert "send it again" in check_problem(response, 503)
            assert client.get("/readyz").status_code == 503
            assert client.get("/healthz").status_code == 200
        finally:
            os.kill(state.pid, signal.SIGCONT)
        deadline = monotonic() + TIMEOUT_S
        while client.post("/images", content=JPEG + b"after", headers=JPEG_TYPE).status_code != 202:
            assert monotonic() < deadline


def test_any_request_gets_a_documented_response(home: Settings, kafka: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Valid and invalid requests, generated from the gateway's OpenAPI description, over real HTTP."""
    import schemathesis
    from schemathesis import GenerationMode
    from schemathesis.checks import CHECKS

    for name in ("predictions", "labels"):  # without these tables, labels are answered with 503
        Table(home.place.tables, name)
    for module in ("routes", "following"):
        monkeypatch.setattr(f"streaming.gateway.{module}.MAX_WAIT_S", 0.1)  # no image is ever scored
    with served(home, kafka, KEY) as client:
        schema = schemathesis.openapi.from_url(f"{client.base_url}/openapi.json", headers={"X-API-Key": KEY})
        excluded = [CHECKS.get_one("positive_data_acceptance")]  # data that match the schema need not be an image
        # All form fields are text, and in a URL an array of one value is that value.
        excluded_of_text = [*excluded, CHECKS.get_one("negative_data_rejection")]
        described = [result.ok() for result in schema.get_all_operations()]
        endless = "/v1/predictions/stream"
        operations = [one for one in described if not one.definition.raw.get("deprecated") and one.path != endless]
        assert {operation.label for operation in operations} >= {"POST /v1/images", "GET /v1/predictions/{image_id}"}
        for operation in operations:
            no_input = operation.path in {"/livez", "/readyz"}
            for mode in [GenerationMode.POSITIVE] if no_input else GenerationMode:

                @examples(max_examples=8, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
                @given(case=operation.as_strategy(generation_mode=mode))
                def check(case: Any) -> None:
                    arrays = any(isinstance(value, list) for value in (case.query or {}).values())
                    checks = excluded_of_text if arrays or "/images" in case.operation.path else excluded
                    case.call_and_validate(timeout=40, headers={"X-API-Key": KEY}, excluded_checks=checks)

                check()
