"""A proxy in front of a Kafka broker that can hide an API key from clients, as if the broker did not support it.

Source: Kafka's protocol guide, "Protocol Primitive Types" and "ApiVersions".
"""

import socket
import socketserver
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Thread
from typing import Any

API_VERSIONS, INIT_PRODUCER_ID = 18, 22
UNKNOWN = 32767  # an unused API key
COMPACT_SINCE = 3  # first version of the response with a compact array and tagged fields


class KafkaProxy(socketserver.ThreadingTCPServer):
    """A server on a free port; `hidden` is the hidden API key, and may change between connections."""

    allow_reuse_address = daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Connection)
        self.broker = ("", 0)
        self.hidden: int | None = None


class _Connection(socketserver.BaseRequestHandler):
    server: KafkaProxy

    def handle(self) -> None:
        requested: dict[int, int] = {}  # correlation id → version of an ApiVersions request
        with suppress(OSError), socket.create_connection(self.server.broker) as broker:
            Thread(target=self._forward, args=(broker, requested), daemon=True).start()
            for response in _frames(broker):
                version = requested.pop(struct.unpack_from(">i", response)[0], None)
                shown = response if version is None else _without(response, version, self.server.hidden)
                self.request.sendall(struct.pack(">i", len(shown)) + shown)

    def _forward(self, broker: socket.socket, requested: dict[int, int]) -> None:
        with suppress(OSError):
            for request in _frames(self.request):
                key, version, correlation = struct.unpack_from(">hhi", request)
                if key == API_VERSIONS:
                    requested[correlation] = version
                broker.sendall(struct.pack(">i", len(request)) + request)
        with suppress(OSError):
            broker.shutdown(socket.SHUT_RDWR)


def _frames(connection: Any) -> Iterator[bytes]:
    with connection.makefile("rb") as source:
        while head := source.read(4):
            yield source.read(struct.unpack(">i", head)[0])


def _without(response: bytes, version: int, hidden: int | None) -> bytes:
    """An ApiVersions response in which the hidden key is replaced by an unused one."""
    data = bytearray(response)
    error, at = struct.unpack_from(">h", data, 4)[0], 6
    if error:  # unsupported version of the request: the response has version 0
        version = 0
    if version >= COMPACT_SINCE:
        assert data[at] < 0x80, "expected fewer than 127 API keys"
        count, at, size = data[at] - 1, at + 1, 7
    else:
        count, at, size = struct.unpack_from(">i", data, at)[0], at + 4, 6
    for entry in range(at, at + count * size, size):
        if struct.unpack_from(">h", data, entry)[0] == hidden:
            struct.pack_into(">h", data, entry, UNKNOWN)
    return bytes(data)


@contextmanager
def kafka_proxy() -> Iterator[KafkaProxy]:
    """Run a proxy for the block; set its `broker` before use."""
    with KafkaProxy() as proxy:
        thread = Thread(target=proxy.serve_forever, args=(0.02,))  # seconds until it notices that it is shut down
        thread.start()
        try:
            yield proxy
        finally:
            proxy.shutdown()
            thread.join()
