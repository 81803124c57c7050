"""Token authentication of the dashboard, for browsers and attackers."""

from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocket, WebSocketDisconnect

from streaming.dashboard.auth import COOKIE, TokenAuth, read_token
from streaming.errors import ServiceError

TOKEN = "0123456789abcdef-ü"  # noqa: S105


@pytest.fixture
def client() -> TestClient:
    async def echo(socket: WebSocket) -> None:
        await socket.accept()
        await socket.send_text("inside")
        await socket.close()

    async def inside(request: object) -> PlainTextResponse:
        return PlainTextResponse("inside")

    routes = [Route("/{path:path}", inside, methods=["GET", "PUT", "POST"]), WebSocketRoute("/stream", echo)]
    app = Starlette(routes=routes, middleware=[Middleware(TokenAuth, token=TOKEN)])
    return TestClient(app, follow_redirects=False)


@pytest.mark.parametrize("path", ["/", "/live", "/media/picture.png", "/_stcore/health", "/?token=wrong", "/?token="])
def test_nothing_is_served_without_the_token(client: TestClient, path: str) -> None:
    response = client.get(path)
    assert response.status_code == 401
    assert "inside" not in response.text
    assert COOKIE not in response.cookies
    assert client.put(path, content=b"x").status_code == 401


def test_websocket_is_refused_without_the_token(client: TestClient) -> None:
    with pytest.raises(WebSocketDisconnect), client.websocket_connect("/stream"):
        pass


def test_token_in_the_url_sets_a_cookie_and_is_removed(client: TestClient) -> None:
    response = client.get("/models", params={"token": TOKEN, "x": "1"})
    assert (response.status_code, response.headers["location"]) == (303, "/models?x=1")
    cookie = response.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    assert TOKEN not in cookie
    assert client.get("/models").text == "inside"
    with client.websocket_connect("/stream") as socket:
        assert socket.receive_text() == "inside"
    assert client.get("/models", params={"token": "left"}).headers["location"] == "/models"


def test_form_accepts_the_token_and_reports_a_wrong_one(client: TestClient) -> None:
    assert "Wrong token" not in client.get("/").text
    assert "Wrong token" in client.post("/", data={"token": "wrong"}).text
    assert client.post("/", content=b"token=" + b"x" * 100_000).status_code == 401
    assert client.post("/", data={"token": TOKEN}).status_code == 303
    assert client.get("/").text == "inside"


def test_redirect_stays_on_the_host(client: TestClient) -> None:
    response = client.get("//evil.example/%5c", params={"token": TOKEN})
    assert response.status_code == 303
    assert response.headers["location"].startswith("/")
    assert not response.headers["location"].startswith(("//", "/\\"))


def test_short_or_missing_token_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "token"
    with pytest.raises(ServiceError, match="cannot be read"):
        read_token(file)
    file.write_text("secret\n")
    with pytest.raises(ServiceError, match="has 6 characters, expected at least 16"):
        read_token(file)
    file.write_text(f"  {TOKEN}\n", encoding="utf-8")
    assert read_token(file) == TOKEN
