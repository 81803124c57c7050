"""Limits on clients of the dashboard: concurrent websockets, upload sizes, and the origin of requests.

ASGI middleware in front of everything else. Only pages of the dashboard itself may open a websocket: browsers send the
page's origin (RFC 6455, section 10.2) but do not prevent pages of other sites from opening one.
"""

from starlette.requests import HTTPConnection
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_SOCKETS = 64  # one per open page
MAX_UPLOADS = 4  # concurrent
FORM_BYTES = 1024**2  # overhead of a form around a file
POLICY_VIOLATION, TRY_AGAIN_LATER = 1008, 1013  # close codes of websockets, RFC 6455, section 7.4.1, and IANA
READING = {"GET", "HEAD", "OPTIONS"}


class ConnectionLimits:
    """Passes on requests within the limits and rejects others."""

    def __init__(self, app: ASGIApp, max_bytes: int, max_sockets: int = MAX_SOCKETS) -> None:
        """Create the middleware.

        Args:
            max_bytes: maximum size of an uploaded file.
            max_sockets: maximum number of concurrent websockets.
        """
        self._app = app
        self._max_bytes = max_bytes + FORM_BYTES
        self._max_sockets = max_sockets
        self._sockets = 0
        self._uploads = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request (ASGI)."""
        if scope["type"] == "websocket":
            await self._socket(scope, receive, send)
        elif scope["type"] == "http" and scope["method"] not in READING:
            await self._upload(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _socket(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not _same_site(HTTPConnection(scope), missing=False):
            await send({"type": "websocket.close", "code": POLICY_VIOLATION})
        elif self._sockets >= self._max_sockets:
            await send({"type": "websocket.close", "code": TRY_AGAIN_LATER})
        else:
            self._sockets += 1
            try:
                await self._app(scope, receive, send)
            finally:
                self._sockets -= 1

    async def _upload(self, scope: Scope, receive: Receive, send: Send) -> None:
        connection = HTTPConnection(scope)
        declared = connection.headers.get("content-length", "0")
        refusal = None
        if not _same_site(connection, missing=True):
            refusal = PlainTextResponse("cross-origin requests are not allowed", 403)
        elif not (declared.isascii() and declared.isdecimal()) or int(declared[:20]) > self._max_bytes:
            refusal = PlainTextResponse(f"at most {self._max_bytes:,} bytes are accepted", 413)
        elif self._uploads >= MAX_UPLOADS:
            refusal = PlainTextResponse("too many uploads at once: try again", 503, {"Retry-After": "5"})
        if refusal is not None:
            refusal.headers["Connection"] = "close"  # its body is not read
            await refusal(scope, receive, send)
            return
        self._uploads += 1
        try:
            await self._app(scope, self._bounded(receive), send)
        finally:
            self._uploads -= 1

    def _bounded(self, receive: Receive) -> Receive:
        """Pass on a body up to the limit, regardless of its declared length; beyond that, disconnect."""
        taken = 0

        async def bounded() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            return message if taken <= self._max_bytes else {"type": "http.disconnect"}

        return bounded


def _same_site(connection: HTTPConnection, *, missing: bool) -> bool:
    """Return whether a request has this server's origin; `missing` if it has no origin."""
    origin = connection.headers.get("origin")
    if origin is None:
        return missing
    return origin.partition("://")[2] == connection.headers.get("host", "")
