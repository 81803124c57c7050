"""A proxy before an object store that harms requests: answers are lost, connections cut, requests refused or held."""

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
    """What happens to a request."""

    CUT = "cut"  # the connection ends before the store gets it
    LOST = "lost"  # the store's answer is lost
    CONFLICT = "409 ConditionalRequestConflict"
    ERROR = "500 InternalError"
    SLOW_DOWN = "503 SlowDown"
    OTHER_REGION = "400 AuthorizationHeaderMalformed"
    NO_BUCKET = "404 NoSuchBucket"
    UNCONDITIONAL = "unconditional"  # the answer says that it was stored, as of a store that knows no conditions


ANYTHING = (Fault.CUT, Fault.LOST, Fault.ERROR, Fault.SLOW_DOWN)


@dataclass(frozen=True)
class Request:
    """A request, as faults are chosen for it."""

    method: str
    path: str  # with its query
    head: bytes

    @property
    def creates(self) -> bool:
        """Whether it is a put of an object that must not exist yet."""
        return b"\r\nif-none-match:" in self.head.lower()


Faults = Callable[[Request], Fault | None]


def at_random(rng: Random, puts: float = 0.10, gets: float = 0.03) -> Faults:
    """Harm a share of the PUTs, and one of all other requests; no fault twice before each one has its turn."""
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
    """Passes requests to a store on loopback, one thread for each connection.

    Attributes:
        upstream: the port of the store, for connections that are opened from now on.
        faults: chosen for each request.
        requests: (method, path) of all that came, in order.
        harmed: how many requests were harmed, by fault.
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
        """For the block, connections end at once, those that are open too."""
        self._away = True
        self._close_all()
        try:
            yield
        finally:
            self._away = False

    def hold(self, method_and_path: str) -> None:
        """Keep back the first request that matches, until `release`; its sender may be dead by then."""
        self._arrived.clear()
        self._released.clear()
        self._held = re.compile(method_and_path)

    def wait_held(self, patience_s: float) -> bool:
        """Wait for the request that is held back to arrive; whether it did."""
        return self._arrived.wait(patience_s)

    def release(self) -> None:
        """Let the held request pass."""
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
                with client.makefile("rb") as asked, store.makefile("rb") as answers:
                    while self._pass_one(client, store, asked, answers):
                        pass
            finally:
                with self._lock:
                    self._open.discard(client)

    def _pass_one(self, client: socket.socket, store: socket.socket, asked: BinaryIO, answers: BinaryIO) -> bool:
        """Pass one request and its answer; whether the connection lasts."""
        head = _head(asked)
        if not head:
            return False
        body = asked.read(_length(head))
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
        answer = _answer(answers, method)
        if fault is Fault.LOST:
            return False
        if fault is Fault.UNCONDITIONAL and method == "PUT" and answer.split(b" ")[1:2] in ([b"409"], [b"412"]):
            answer = b'HTTP/1.1 200 OK\r\netag: "0"\r\ncontent-length: 0\r\n\r\n'
        client.sendall(answer)
        return bool(answer)


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


def _answer(stream: BinaryIO, method: str) -> bytes:
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
