"""Limits on the connections of the gateway and the dashboard: their number, and the time to send headers.

uvicorn limits how long a connection may be idle after a request, but not before its first one. Here each request has a
timeout for its headers. If there are too many connections, the longest idle one is closed, first among those of the
same address, so that a client that opens a thousand idle connections only loses its own.
"""

import asyncio
import ipaddress
from contextlib import suppress
from typing import Any

import h11
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from streaming.gateway.problems import problem

MAX_CONNECTIONS = 1_000
MAX_PER_ADDRESS = 256
HEADER_TIMEOUT_S = 10.0  # from the first byte of a request, or the start of a connection, to the end of its headers
LINGER_S = 5.0  # for the client to read a response that was sent before the end of its body
DRAINED_BYTES = 64 * 1024**2  # read and discarded, since closing a connection with unread bytes loses the response


class Connections:
    """The open connections of one server, oldest first."""

    def __init__(self, limit: int = MAX_CONNECTIONS, per_address: int = MAX_PER_ADDRESS) -> None:
        self._limit = limit
        self._per_address = per_address
        self._open: dict[BoundedProtocol, str] = {}

    def admit(self, one: "BoundedProtocol", address: str) -> bool:
        """Accept a connection, closing an idle one if necessary; False if all others are busy."""
        self._forget_closed()
        same = [other for other, its_address in self._open.items() if its_address == address]
        if len(same) >= self._per_address and not self._close_silent(same):
            return False
        if len(self._open) >= self._limit and not self._close_silent([*same, *self._open]):
            return False
        self._open[one] = address
        return True

    def drop(self, one: "BoundedProtocol") -> None:
        self._open.pop(one, None)

    def _close_silent(self, among: "list[BoundedProtocol]") -> bool:
        for one in among:
            if one.silent and one in self._open:
                del self._open[one]
                one.transport.close()
                return True
        return False

    def _forget_closed(self) -> None:
        """Remove closed websockets, for which `drop` is not called."""
        if len(self._open) >= self._per_address:
            for one in [one for one in self._open if one.transport.is_closing()]:
                del self._open[one]


class BoundedProtocol(H11Protocol):
    """HTTP/1.1 on one connection."""

    bounds: Connections  # of the server, set by `protocol_of`

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._deadline: asyncio.TimerHandle | None = None
        self._upgraded = False

    @property
    def silent(self) -> bool:
        """Whether no request is in progress."""
        return not self._upgraded and (self.cycle is None or self.cycle.response_complete)

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if not self.bounds.admit(self, network_of(self.client[0] if self.client else "")):
            self.connections.discard(self)
            transport.abort()
            return
        self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self.bounds.drop(self)
        self._headers_came()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.silent and self._deadline is None:
            self._await_headers()
        super().data_received(data)
        if not self.silent:
            self._headers_came()

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        self._upgraded = True
        self._headers_came()
        super().handle_websocket_upgrade(event)

    def send_400_response(self, msg: str) -> None:
        """Answer invalid HTTP, or headers that are too long, with a problem document like the application's."""
        answer = problem(400, msg)
        headers = [*answer.raw_headers, (b"connection", b"close")]
        refusal = h11.Response(status_code=400, headers=headers, reason=b"Bad Request")
        for event in (refusal, h11.Data(data=bytes(answer.body)), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.conn.their_state is h11.SEND_BODY:  # the rest of the body will not be read
            self.flow.pause_reading()
            self._headers_came()
            self._deadline = self.loop.call_later(LINGER_S, self._give_up)

    def _await_headers(self) -> None:
        self._deadline = self.loop.call_later(HEADER_TIMEOUT_S, self._give_up)

    def _headers_came(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _give_up(self) -> None:
        self._deadline = None
        if self.silent and not self.transport.is_closing():
            self.transport.close()


def network_of(address: str) -> str:
    """The unit of limits: an IPv4 address, or the /64 network of an IPv6 address, which a single host may own."""
    try:
        return str(ipaddress.ip_network((address, 64), strict=False)) if ":" in address else address
    except ValueError:
        return address


def protocol_of(bounds: Connections) -> type[BoundedProtocol]:
    """The protocol class for a server, whose connections share `bounds`."""
    return type("ServedProtocol", (BoundedProtocol,), {"bounds": bounds})


class CloseUnread:
    """ASGI middleware for responses that are sent before the end of the request's body.

    The rest of the body is read and discarded, so that the client receives the response and can continue. If it is too
    long or too slow, the connection is closed after the response.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request; see ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        unread = b"transfer-encoding" in headers or headers.get(b"content-length", b"0") != b"0"

        async def read() -> Message:
            nonlocal unread
            message = await receive()
            unread = unread and bool(message.get("more_body"))
            return message

        async def drain() -> None:
            left = DRAINED_BYTES
            with suppress(TimeoutError):
                async with asyncio.timeout(LINGER_S):
                    while unread and left > 0:
                        left -= len((await read()).get("body", b""))

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start" and unread:
                await drain()
            if message["type"] == "http.response.start" and unread:
                message["headers"] = [*message.get("headers", ()), (b"connection", b"close")]
            await send(message)

        await self._app(scope, read, answer)
