"""Token authentication: without the token, a browser is served nothing but a login form.

ASGI middleware in front of Streamlit, for pages, pictures, uploads and the websocket. A browser that presents the token
once, as `?token=…` or in the form, gets a cookie with a random value of this process and is redirected to a URL without
the token.
"""

import hmac
import secrets
from pathlib import Path
from urllib.parse import parse_qs

from starlette.datastructures import MutableHeaders
from starlette.requests import HTTPConnection, Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from streaming.errors import ConfigurationError
from streaming.secret_files import check_secret_file

COOKIE = "imagestream_dashboard"
MIN_TOKEN_CHARS = 16
MAX_FORM_BYTES = 4096
POLICY_VIOLATION = 1008  # close code of a websocket, RFC 6455, section 7.4.1
# With the policy "no-referrer", browsers post a form with the origin "null", as pages of other sites may.
FORM = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>imagestream</title>
<meta name="viewport" content="width=device-width"><meta name="referrer" content="same-origin"><style>
:root {{ color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }}
body {{ display: grid; place-items: center; min-height: 90vh; margin: 0 }}
form {{ display: grid; gap: .75rem; width: min(22rem, 90vw) }}
h1 {{ font-size: 1.4rem; margin: 0 }} p {{ margin: 0; opacity: .75 }} .no {{ color: #dc2626; opacity: 1 }}
input, button {{ font: inherit; padding: .55rem .7rem; border-radius: .5rem; border: 1px solid #8888 }}
button {{ background: #2563eb; color: #fff; border: 0 }}
</style></head><body><form method="post" action="/"><h1>imagestream</h1>
<p>Enter the token of this dashboard.</p>{said}
<input name="token" type="password" autocomplete="current-password" aria-label="Token" autofocus required>
<button>Open</button></form></body></html>"""


def read_token(path: Path) -> str:
    """Read the token from a file, without surrounding whitespace.

    Raises:
        ServiceError: the file cannot be read, or the token is too short.
    """
    try:
        check_secret_file(path)
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"the token file {path} cannot be read: {error}") from error
    if len(token) < MIN_TOKEN_CHARS:
        raise ConfigurationError(
            f"the token in {path} has {len(token)} characters, expected at least {MIN_TOKEN_CHARS}: "
            "generate one with `openssl rand -hex 32`"
        )
    return token


class TokenAuth:
    """Passes on requests with the cookie; others get the login form, and websockets are closed."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._token = token
        self._cookie = secrets.token_urlsafe(32)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request (ASGI)."""
        if scope["type"] not in {"http", "websocket"}:
            await self._app(scope, receive, send)
            return
        if _same(HTTPConnection(scope).cookies.get(COOKIE, ""), self._cookie):
            if scope["type"] == "http" and "token" in HTTPConnection(scope).query_params:
                await _without_token(Request(scope))(scope, receive, send)
                return
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": POLICY_VIOLATION})
        else:
            response = await self._request_token(Request(scope, receive))
            await response(scope, receive, send)

    async def _request_token(self, request: Request) -> Response:
        shown = await _shown_token(request)
        if shown is None or not _same(shown, self._token):
            said = "" if shown is None else '<p class="no" role="alert">Wrong token.</p>'
            return HTMLResponse(FORM.format(said=said), status_code=401, headers={"Cache-Control": "no-store"})
        response = _without_token(request)
        secure = request.url.scheme == "https"
        response.set_cookie(COOKIE, self._cookie, httponly=True, samesite="strict", secure=secure)
        return response


async def _shown_token(request: Request) -> str | None:
    """Return the token in the URL or in a posted form; None if there is none."""
    if request.method == "GET":
        return request.query_params.get("token")
    body = b""
    if request.method == "POST":
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_FORM_BYTES:
                return ""
    return parse_qs(body.decode("utf-8", "replace")).get("token", [None])[0]


def _without_token(request: Request) -> Response:
    address = request.url.remove_query_params("token")
    path = address.path + (f"?{address.query}" if address.query else "")
    response = RedirectResponse("/" + path.lstrip("/\\"), status_code=303)
    headers = MutableHeaders(raw=response.raw_headers)
    headers["Cache-Control"] = "no-store"
    headers["Referrer-Policy"] = "no-referrer"
    return response


def _same(shown: str, expected: str) -> bool:
    return hmac.compare_digest(shown.encode("utf-8", "surrogateescape"), expected.encode())
