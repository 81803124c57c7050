"""Who may use the gateway: whoever has an API key; without keys, programs of this machine alone.

A browser is a program of this machine, too, and any page that it shows can make it send requests. So a request that
says that it comes from another site is refused, and without keys so is one for a name that is not this machine's,
which a page could have been given.
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
    """The API keys: the lines of the file, without white space around them; none if no file is given.

    Raises:
        ConfigurationError: the file cannot be read, or a line is not a key of 16 printable ASCII characters or more.
    """
    if path is None:
        return ()
    try:
        check_secret_file(path)
        with path.open("rb") as file:
            text = file.read(MAX_KEY_BYTES + 1).decode("ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"the file of the API key, {path}, cannot be read: {error}") from error
    if len(text) > MAX_KEY_BYTES:
        raise ConfigurationError(f"the file of the API key, {path}: expected at most {MAX_KEY_BYTES:,} bytes, got more")
    keys = [line.strip() for line in text.split("\n") if line.strip()]
    for key in keys or [""]:
        if len(key) < MIN_KEY_CHARS or not key.isprintable():
            raise ConfigurationError(
                f"the file of the API key, {path}: expected at least {MIN_KEY_CHARS} printable characters on a line, "
                f"got {len(key)}; make one with: openssl rand -hex 32"
            )
    return tuple(dict.fromkeys(keys))


def is_loopback(host: str) -> bool:
    """Whether a name or an address is this machine's own, reachable from nowhere else."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_binding(host: str, keys: Collection[str]) -> None:
    """Raises a UsageError if others could reach the gateway and there is no key to keep them out."""
    if not keys and not is_loopback(host):
        raise UsageError(
            f"--host {host} lets other machines in: give the gateway an API key in a file, "
            "IMAGESTREAM_GATEWAY_API_KEY_FILE=FILE, or leave it on 127.0.0.1"
        )


def access(keys: Sequence[str]) -> Callable[..., None]:
    """A FastAPI dependency that lets a request pass or refuses it, before its body is read.

    The request's `state.api_key` is then the number of its key, from 0.
    """
    secrets = [key.encode() for key in keys]

    def with_key(
        request: Request,
        header: Annotated[str | None, Depends(header_key)],
        bearer: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer_key)],
    ) -> None:
        refuse_other_sites(request)
        given = header if header is not None else bearer.credentials if bearer is not None else ""
        same = [hmac.compare_digest(given.encode(), secret) for secret in secrets]  # all, in the same time
        if True not in same:
            raise HTTPException(
                401, "expected the API key in X-API-Key or as a bearer token", {"WWW-Authenticate": "Bearer"}
            )
        request.state.api_key = same.index(True)

    def without_key(request: Request) -> None:
        refuse_other_sites(request)
        if not is_loopback(PORT.sub("", request.headers.get("host", ""))):
            raise HTTPException(403, "without an API key the gateway answers to this machine's own name only")

    return with_key if secrets else without_key


def refuse_other_sites(request: Request) -> None:
    """403 for what a browser sends on behalf of another site's page."""
    origin = request.headers.get("origin")
    if origin is not None and origin.partition("://")[2] != request.headers.get("host", ""):
        raise HTTPException(403, "requests from the pages of another site are refused")
