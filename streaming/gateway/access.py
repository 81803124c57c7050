"""Access control of the gateway: by API key, or, without a key, restricted to programs on this machine.

A browser also runs on this machine, and any page that it displays can make it send requests. So cross-origin requests
are rejected, and, without a key, so are requests whose Host is not this machine's own name (DNS rebinding).
"""

import hmac
import ipaddress
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from fastapi import Depends, HTTPException, Request
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer

from streaming.errors import ConfigurationError, UsageError
from streaming.secret_files import check_secret_file

MIN_KEY_CHARS = 16
MAX_KEY_BYTES = 4096
PORT = re.compile(r":[0-9]*$")

header_key = APIKeyHeader(name="X-API-Key", auto_error=False, description="the API key")
bearer_key = HTTPBearer(auto_error=False, description="the API key as a bearer token")


def read_key(path: Path | None) -> str | None:
    """The API key: the content of the file without surrounding white space; None if no file is given.

    Raises:
        ServiceError: the file cannot be read, or the key has fewer than 16 printable ASCII characters.
    """
    if path is None:
        return None
    try:
        check_secret_file(path)
        with path.open("rb") as file:
            key = file.read(MAX_KEY_BYTES).decode("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"the API key file {path} cannot be read: {error}") from error
    if len(key) < MIN_KEY_CHARS or not key.isprintable():
        raise ConfigurationError(
            f"the API key file {path}: expected at least {MIN_KEY_CHARS} printable characters, got {len(key)}; "
            "generate a key with: openssl rand -hex 32"
        )
    return key


def is_loopback(host: str) -> bool:
    """Whether a host name or address is a loopback address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_binding(host: str, key: str | None) -> None:
    """Check that the gateway has an API key if other machines can reach it.

    Raises:
        ServiceError: it has none.
    """
    if key is None and not is_loopback(host):
        raise UsageError(
            f"--host {host} lets other machines in: set IMAGESTREAM_GATEWAY_API_KEY_FILE to a file with an API key, "
            "or use 127.0.0.1"
        )


def access(key: str | None) -> Callable[..., None]:
    """A FastAPI dependency that accepts or rejects a request before its body is read."""

    def with_key(
        request: Request,
        header: Annotated[str | None, Depends(header_key)],
        bearer: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer_key)],
    ) -> None:
        refuse_other_sites(request)
        given = header if header is not None else bearer.credentials if bearer is not None else ""
        if not hmac.compare_digest(given.encode(), (key or "").encode()):
            raise HTTPException(
                401, "expected the API key in X-API-Key or as a bearer token", {"WWW-Authenticate": "Bearer"}
            )

    def without_key(request: Request) -> None:
        refuse_other_sites(request)
        if not is_loopback(PORT.sub("", request.headers.get("host", ""))):
            raise HTTPException(403, "without an API key, the gateway accepts requests to localhost only")

    return without_key if key is None else with_key


def refuse_other_sites(request: Request) -> None:
    """Reject a cross-origin request of a browser with 403."""
    origin = request.headers.get("origin")
    if origin is not None and origin.partition("://")[2] != request.headers.get("host", ""):
        raise HTTPException(403, "cross-origin requests are not allowed")
