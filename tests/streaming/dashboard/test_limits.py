"""Limits on connections and uploads of the dashboard, and refusal of requests from other origins."""

from collections.abc import Iterator

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocket, WebSocketDisconnect

from streaming.dashboard.limits import FORM_BYTES, ConnectionLimits

HOME = {"Origin": "http://testserver"}
TOO_LARGE = 100 + FORM_BYTES + 1


async def upload(request: Request) -> PlainTextResponse:
    return PlainTextResponse(str(len(await request.body())))


async def echo(socket: WebSocket) -> None:
    await socket.accept()
    async for text in socket.iter_text():
        await socket.send_text(text)


@pytest.fixture
def client() -> Iterator[TestClient]:
    routes = [Route("/upload", upload, methods=["GET", "PUT"]), WebSocketRoute("/stream", echo)]
    middleware = [Middleware(ConnectionLimits, max_bytes=100, max_sockets=2)]
    with TestClient(Starlette(routes=routes, middleware=middleware), raise_server_exceptions=False) as client:
        yield client


@pytest.mark.parametrize("origin", ["http://elsewhere.test", "http://testserver.elsewhere.test", "null", "", None])
def test_websocket_is_accepted_from_the_same_origin_only(client: TestClient, origin: str | None) -> None:
    headers = {} if origin is None else {"Origin": origin}
    with pytest.raises(WebSocketDisconnect) as closed, client.websocket_connect("/stream", headers=headers):
        pass
    assert closed.value.code == 1008
    for scheme in ("http", "https"):  # TLS may be terminated by a proxy
        with client.websocket_connect("/stream", headers={"Origin": f"{scheme}://testserver"}) as socket:
            socket.send_text("hello")
            assert socket.receive_text() == "hello"


def test_number_of_websockets_is_limited_and_closed_ones_are_released(client: TestClient) -> None:
    with client.websocket_connect("/stream", headers=HOME), client.websocket_connect("/stream", headers=HOME) as second:
        with pytest.raises(WebSocketDisconnect) as closed, client.websocket_connect("/stream", headers=HOME):
            pass
        assert closed.value.code == 1013
        second.send_text("bye")
        assert second.receive_text() == "bye"
    with client.websocket_connect("/stream", headers=HOME) as socket:
        socket.send_text("again")
        assert socket.receive_text() == "again"


def test_cross_origin_or_too_large_upload_is_refused(client: TestClient) -> None:
    assert client.put("/upload", content=b"x" * 100).text == "100"
    assert client.put("/upload", content=b"x", headers={"Origin": "http://elsewhere.test"}).status_code == 403
    assert client.put("/upload", content=bytes(TOO_LARGE)).status_code == 413
    for declared in ("-1", "1e9", "9" * 5000):
        assert client.put("/upload", content=b"x", headers={"Content-Length": declared}).status_code == 413
    assert client.get("/upload", headers={"Origin": "http://elsewhere.test"}).status_code == 200


def test_chunked_upload_is_refused_above_the_limit(client: TestClient) -> None:
    assert client.put("/upload", content=(bytes(FORM_BYTES) for _ in range(3))).status_code != 200
    assert client.put("/upload", content=b"x").text == "1"
