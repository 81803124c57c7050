"""Marks the responses of deprecated routes, those without /v1, with the route that replaces them."""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

PREFIX = "/v1"
DEPRECATED = b"@1796083200"  # 2026-12-01 in the format of RFC 9745


class MarkDeprecated:
    """ASGI middleware: `Deprecation` (RFC 9745) and `Link` with rel="successor-version" for the old routes."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request; see ASGI."""
        if scope["type"] != "http" or not scope["path"].startswith(("/images", "/predictions/")):
            await self._app(scope, receive, send)
            return
        successor = PREFIX.encode() + scope["raw_path"]

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                link = b'<%s>; rel="successor-version"' % successor
                marks = [(b"deprecation", DEPRECATED), (b"link", link)]
                message["headers"] = [*message.get("headers", ()), *marks]
            await send(message)

        await self._app(scope, receive, answer)
