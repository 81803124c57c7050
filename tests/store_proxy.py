"""A proxy in front of an object store that injects faults: lost responses, cut connections, errors and delays."""

import re
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from random import Random
from typing import BinaryIO, Self

REFUSAL = "<?xml version='1.0'?><Error><Code>{code}</Code><Message>on behalf of a test</Message></Error>"


class Fault(StrEnum):
    """A fault that is injected into a request."""

    CUT = "cut"  # the connection is closed before the store receives the request
    LOST = "lost"  # the response of the store is lost
    CONFLICT = "409 ConditionalRequestConflict"
    ERROR = "500 InternalError"
    SLOW_DOWN = "503 SlowDown"
    OTHER_REGION = "400 AuthorizationHeaderMalformed"
    NO_BUCKET = "404 NoSuchBucket"
    UNCONDITIONAL = "unconditional"  # a failed condition is reported as success, as if it were ignored


ANYTHING = (Fault.CUT, Fault.LOST, Fault.ERROR, Fault.SLOW_DOWN)


@dataclass(frozen=True)
class Request:
    """A request for which a fault may be chosen."""

    method: str
    path: str  # with the query string
    head: bytes

    @property
    def creates(self) -> bool:
        """Whether it is a PUT of an object that must not exist yet."""
        return b"\r\nif-none-match:" in self.head.lower()


Faults = Callable[[Request], Fault | None]


def at_random(rng: Random, puts: float = 0.10, gets: float = 0.03) -> Faults:
    """Inject faults into fractions of PUTs and of other requests; each fault is used once before any is repeated."""
    lock = threading.Lock()
    used: set[Fault] = set()

    def choose(request: Request) -> Fault | None:
        with lock:
            if rng.random() >= (puts if request.method == "PUT" else gets):
                return None
            kinds = [*ANYTHING, Fault.CONFLICT] if request.creates else [*ANYTHING]
            if used.issuperset(kinds):
                used.difference_update(kinds)
            chosen = rng.choice([kind for kind in kinds if kind not in used])
            used.add(chosen)
            return chosen

    return choose


class StoreProxy:
    """Forwards requests to a store on loopback, with one thread per connection.

    Attributes:
        upstream: the port of the store, for new connections.
        faults: chooses the fault of each request.
        requests: (method, path) of all requests, in order.
        harmed: the number of injected faults, by fault.
    """

    def __init__(self, upstream: int, faults: Faults = lambda _: None) -> None:
        self.faults = faults
        self.requests: list[tuple[str, str]] = []
        self.harmed: Counter[Fault] = Counter()
        self.upstream = upstream
        self._held: re.Pattern[str] | None = None
        self._arrived, self._released = threading.Event(), threading.Event()
        self._away = False
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._released.set()
        self._listener.close()
        self._close_all()

    @contextmanager
    def away(self) -> Iterator[None]:
        """Close all connections, and new ones at once, for the block."""
        self._away = True
        self._close_all()
        try:
            yield
        finally:
            self._away = False

    def hold(self, method_and_path: str) -> None:
        """Hold the first request that matches until `release`; its sender may have exited by then."""
        self._arrived.clear()
        self._released.clear()
        self._held = re.compile(method_and_path)

    def wait_held(self, patience_s: float) -> bool:
        """Wait for the request that is to be held; returns whether it arrived."""
        return self._arrived.wait(patience_s)

    def release(self) -> None:
        """Forward the held request."""
        self._released.set()

    def _close_all(self) -> None:
        with self._lock:
            for one in self._open:
                with suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self._away:
                client.close()
                continue
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, suppress(OSError), socket.create_connection(("127.0.0.1", self.upstream)) as store:
            for one in (client, store):
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._open.add(client)
            try:
                with client.makefile("rb") as requests, store.makefile("rb") as responses:
                    while self._forward(client, store, requests, responses):
                        pass
            finally:
                with self._lock:
                    self._open.discard(client)

    def _forward(self, client: socket.socket, store: socket.socket, requests: BinaryIO, responses: BinaryIO) -> bool:
        """Forward one request and its response; returns whether the connection stays open."""
        head = _head(requests)
        if not head:
            return False
        body = requests.read(_length(head))
        method, path, _ = head.split(b"\r\n", 1)[0].decode().split(" ")
        request = Request(method, path, head)
        with self._lock:
            self.requests.append((method, path))
            held = self._held is not None and self._held.search(f"{method} {path}") is not None
            if held:
                self._held = None
        if held:
            self._arrived.set()
            self._released.wait()
        fault = self.faults(request)
        if fault is not None:
            self.harmed[fault] += 1
        if fault is Fault.CUT:
            return False
        if fault is not None and fault[0].isdigit():
            status, code = fault.split(" ")
            text = REFUSAL.format(code=code).encode()
            client.sendall(f"HTTP/1.1 {status} {code}\r\ncontent-length: {len(text)}\r\n\r\n".encode() + text)
            return True
        store.sendall(head + body)
        response = _response(responses, method)
        if fault is Fault.LOST:
            return False
        if fault is Fault.UNCONDITIONAL and method == "PUT" and response.split(b" ")[1:2] in ([b"409"], [b"412"]):
            response = b'HTTP/1.1 200 OK\r\netag: "0"\r\ncontent-length: 0\r\n\r\n'
        client.sendall(response)
        return bool(response)


def _head(stream: BinaryIO) -> bytes:
    lines = []
    while line := stream.readline():
        lines.append(line)
        if line == b"\r\n":
            return b"".join(lines)
    return b""


def _length(head: bytes) -> int:
    found = re.search(rb"\r\ncontent-length: *(\d+)", head, re.IGNORECASE)
    return int(found[1]) if found else 0


def _response(stream: BinaryIO, method: str) -> bytes:
    head = _head(stream)
    if method == "HEAD" or head[9:12] in {b"204", b"304"}:
        return head
    if b"\r\ntransfer-encoding: chunked" not in head.lower():
        return head + stream.read(_length(head))
    parts = [head]
    while True:
        size = stream.readline()
        chunk = stream.read(int(size.split(b";")[0], 16) + 2)
        parts += [size, chunk]
        if chunk == b"\r\n":
            return b"".join(parts)
