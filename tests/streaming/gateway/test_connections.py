"""Idle connections, endless bodies and an API description without external scripts, over real sockets."""

import re
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from time import monotonic
from typing import Any

import httpx
import psutil
import pytest

from streaming.gateway import connections
from streaming.gateway.app import create_app
from streaming.gateway.serve import listen, make_server
from streaming.gateway.service import Broker
from streaming.settings import Settings

MAX_BYTES = 200_000
KEY = "a key of thirty-two characters.."


def unreachable(*_: Any) -> Any:
    raise AssertionError("the request must be refused before it reaches the topic")


@contextmanager
def served(home: Path, *keys: str, log_format: str | None = None) -> Iterator[int]:
    """The port of a gateway in a thread of this process, without a broker."""
    with listen("127.0.0.1", 0) as listener:
        app = create_app(Settings(home=home), Broker(MAX_BYTES, unreachable, lambda: True, 5.0), keys)
        server = make_server(app, access_log=log_format is not None, log_format=log_format or "text")
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=300)


def response_to(port: int, request: bytes) -> bytes:
    """All that is received until the connection is closed."""
    parts = []
    with closing(connect(port)) as one, suppress(ConnectionError):  # closed before the end of the request
        one.sendall(request)
        while part := one.recv(65_536):
            parts.append(part)
    return b"".join(parts)


def test_thousand_idle_connections_block_no_request(tmp_path: Path) -> None:
    with served(tmp_path) as port, ExitStack() as stack:
        for _ in range(1_000):
            stack.enter_context(closing(connect(port)))
        started = monotonic()
        assert httpx.get(f"http://127.0.0.1:{port}/healthz", timeout=300).status_code == 200
        print(f"answered with 1,000 idle connections in {monotonic() - started:.3f} s")


@pytest.mark.parametrize(
    "start",
    [b"", b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX-Slow: ", b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"],
)
def test_connection_without_headers_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: bytes) -> None:
    monkeypatch.setattr(connections, "HEADER_TIMEOUT_S", 0.3)
    with served(tmp_path) as port, closing(connect(port)) as one:
        one.sendall(start)
        if start.endswith(b"\r\n\r\n"):  # the first request is answered; the second one is slow
            assert one.recv(65_536).startswith(b"HTTP/1.1 200")
            one.sendall(b"GET /healthz HTTP/1.1\r\n")
        while one.recv(65_536):  # returns b"" only when the connection is closed
            pass


def test_header_timeout_does_not_close_an_active_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEADER_TIMEOUT_S", 0.2)
    with served(tmp_path) as port:
        found = httpx.get(f"http://127.0.0.1:{port}/predictions/{'0' * 64}?wait=1", timeout=300)
        assert found.status_code == 404


def test_oldest_idle_connection_is_closed_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections.Connections.__init__, "__defaults__", (1_000, 3))
    wait = f"GET /predictions/{'0' * 64}?wait=2 HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    with served(tmp_path) as port, closing(connect(port)) as busy, closing(connect(port)) as idle:
        busy.sendall(wait)
        httpx.get(f"http://127.0.0.1:{port}/healthz", timeout=300)  # then the request of `busy` is being processed
        with closing(connect(port)), closing(connect(port)):
            assert idle.recv(100) == b""
            assert busy.recv(65_536).startswith(b"HTTP/1.1 404")


@pytest.mark.parametrize(
    ("path", "media_type", "declared"),
    [
        (b"/v1/images", b"image/jpeg", b""),
        (b"/v1/images", b"image/jpeg", b"Content-Length: 10\r\n"),
        (b"/v1/labels", b"application/json", b""),
    ],
    ids=["chunked", "chunked with a content length", "labels"],
)
def test_chunked_body_of_a_gigabyte_is_refused_in_constant_memory(
    tmp_path: Path, path: bytes, media_type: bytes, declared: bytes
) -> None:
    head = b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: %s\r\nTransfer-Encoding: chunked\r\n" % (
        path,
        media_type,
    )
    chunk = b"100000\r\n" + b"\xff\xd8\xff" + bytes(0x100000 - 3) + b"\r\n"
    with served(tmp_path) as port, closing(connect(port)) as one:
        before = psutil.Process().memory_info().rss
        one.sendall(head + declared + b"\r\n")
        sent = 0
        try:
            while sent < 1_000:
                one.sendall(chunk)
                sent += 1
        except OSError:  # the server has refused the request and closed the connection
            pass
        assert psutil.Process().memory_info().rss - before < 64 * 1024**2
        assert sent < 1_000
        assert httpx.get(f"http://127.0.0.1:{port}/healthz", timeout=300).status_code == 200


def test_early_refusal_is_readable_and_closes_the_connection(tmp_path: Path) -> None:
    with served(tmp_path) as port:
        head = b"POST /images HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/jpeg\r\n"
        assert response_to(port, head + b"Content-Length: 1000000000\r\n\r\n").startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize("length", [b"-1", b"1e3", b"10\r\nContent-Length: 11", b"9" * 5_000])
def test_invalid_content_length_is_refused(tmp_path: Path, length: bytes) -> None:
    with served(tmp_path) as port:
        head = b"POST /images HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/jpeg\r\nContent-Length: "
        assert re.match(rb"HTTP/1\.1 4(00|13) ", response_to(port, head + length + b"\r\n\r\n\xff\xd8\xff"))


def test_endless_headers_are_refused(tmp_path: Path) -> None:
    with served(tmp_path) as port:
        response = response_to(port, b"GET / HTTP/1.1\r\nX: " + b"a" * 200_000)
        assert response.startswith(b"HTTP/1.1 400 ")
        assert b"content-type: application/problem+json" in response


def test_api_description_requires_the_key_and_loads_nothing_external(tmp_path: Path) -> None:
    with served(tmp_path, KEY) as port, httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
        for path in ("/docs", "/openapi.json"):
            assert client.get(path).status_code == 401
            assert client.get(path, headers={"X-API-Key": KEY}).status_code == 200
        docs = client.get("/docs", headers={"X-API-Key": KEY})
        assert "POST /images" in docs.text
        assert not re.search(r"<script|src=|href=|https?://", docs.text)
        assert docs.headers["content-security-policy"].startswith("default-src 'none'")


def test_addresses_of_one_host_count_as_one() -> None:
    assert connections.network_of("192.0.2.7") == "192.0.2.7"
    assert connections.network_of("2001:db8::1") == connections.network_of("2001:db8::ffff") == "2001:db8::/64"
    assert connections.network_of("2001:db8:0:1::1") != connections.network_of("2001:db8::1")
    assert connections.network_of("unix:") == "unix:"


def test_client_refused_before_the_end_of_its_body_can_continue(tmp_path: Path) -> None:
    with served(tmp_path, KEY) as port, httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=300) as client:
        for _ in range(3):
            refused = client.post("/images", content=bytes(100_000), headers={"Content-Type": "image/jpeg"})
            assert refused.status_code == 401
            assert client.get("/healthz").status_code == 200
