"""Access control of the gateway: by API key, or, without keys, restricted to programs on this machine.

A browser also runs on this machine, and any page that it displays can make it send requests. So cross-origin requests
are rejected, and, without keys, so are requests whose Host is not this machine's own name (DNS rebinding).
"""

import hmac
import ipaddress
import re
from collections.abc import Callable, Collection, Sequence
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


def read_keys(path: Path | None) -> tuple[str, ...]:
    """The API keys: the lines of the file without surrounding white space; none if no file is given.

    Raises:
        ConfigurationError: the file cannot be read, or a key has fewer than 16 printable ASCII characters.
    """
    if path is None:
        return ()
    try:
        check_secret_file(path)
        with path.open("rb") as file:
            text = file.read(MAX_KEY_BYTES + 1).decode("ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"the API key file {path} cannot be read: {error}") from error
    if len(text) > MAX_KEY_BYTES:
        raise ConfigurationError(f"the API key file {path}: expected at most {MAX_KEY_BYTES:,} bytes, got more")
    keys = [line.strip() for line in text.split("\n") if line.strip()]
    for key in keys or [""]:
        if len(key) < MIN_KEY_CHARS or not key.isprintable():
            raise ConfigurationError(
                f"the API key file {path}: expected at least {MIN_KEY_CHARS} printable characters per line, got "
                f"{len(key)}; generate a key with: openssl rand -hex 32"
            )
    return tuple(dict.fromkeys(keys))


def is_loopback(host: str) -> bool:
    """Whether a host name or address is a loopback address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_binding(host: str, keys: Collection[str]) -> None:
    """Check that the gateway has an API key if other machines can reach it; raises UsageError if it has none."""
    if not keys and not is_loopback(host):
        raise UsageError(
            f"--host {host} gives other machines access: set IMAGESTREAM_GATEWAY_API_KEY_FILE to a file with an API key"
            ", or use 127.0.0.1"
        )


def access(keys: Sequence[str]) -> Callable[..., None]:
    """A FastAPI dependency that accepts or rejects a request before its body is read.

    It sets the request's `state.api_key` to the number of its key, from 0.
    """
    secrets = [key.encode() for key in keys]

    def with_key(
        request: Request,
        header: Annotated[str | None, Depends(header_key)],
        bearer: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer_key)],
    ) -> None:
        check_same_origin(request)
        given = header if header is not None else bearer.credentials if bearer is not None else ""
        same = [hmac.compare_digest(given.encode(), secret) for secret in secrets]  # all, in the same time
        if True not in same:
            raise HTTPException(
                401, "expected the API key in X-API-Key or as a bearer token", {"WWW-Authenticate": "Bearer"}
            )
        request.state.api_key = same.index(True)

    def without_key(request: Request) -> None:
        check_same_origin(request)
        if not is_loopback(PORT.sub("", request.headers.get("host", ""))):
            raise HTTPException(403, "without an API key, the gateway accepts requests to localhost only")

    return with_key if secrets else without_key


def check_same_origin(request: Request) -> None:
    """Reject a cross-origin request of a browser with 403."""
    origin = request.headers.get("origin")
    if origin is not None and origin.partition("://")[2] != request.headers.get("host", ""):
        raise HTTPException(403, "cross-origin requests are not allowed")
