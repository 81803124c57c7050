"""Fetches schemas from a registry with Confluent's HTTP API.

A schema never changes under its id, so it can be cached.

Source: "GET /schemas/ids/{int: id}" in the API reference of Confluent's Schema Registry; Karapace and Apicurio have it
as well.
"""

import json
import socket
from contextlib import closing, suppress
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from threading import Event, Timer
from typing import Any
from urllib.parse import urlsplit

from streaming.errors import ConfigurationError, UnavailableError

MAX_SCHEMA_BYTES = 256 * 1024
TIMEOUT_S = 10.0  # for the whole response
AVRO = "AVRO"  # the default type
OK, NOT_FOUND, BUSY, SERVER_ERROR = 200, 404, 429, 500
UNKNOWN_SCHEMA = 40403  # in the body of a 404 for an unknown schema id


class UnknownSchemaError(Exception):
    """The registry has no usable schema with this id."""


class RegistryAwayError(UnavailableError):
    """The registry does not answer at the moment; a later attempt may succeed."""


def fetch_schema(url: str, number: int, timeout_s: float = TIMEOUT_S) -> str:
    """Fetch an Avro schema by its id.

    Args:
        url: of the registry, see the setting `schema_registry`.
        number: the schema's id.
        timeout_s: for connecting, and again for the whole response.

    Returns:
        The schema, as JSON.

    Raises:
        UnknownSchemaError: it does not exist, or is not a self-contained Avro schema of at most `MAX_SCHEMA_BYTES`
        bytes.
        RegistryAwayError: there was no response in time, or a server error.
        ServiceError: the URL is not that of a schema registry without authentication.
    """
    try:
        status, body = _get(url, f"/schemas/ids/{number}", timeout_s)
    except (OSError, HTTPException) as error:
        why = str(error) or type(error).__name__
        raise RegistryAwayError(f"the schema registry {url} did not answer within {timeout_s:g} s: {why}") from error
    if status == BUSY or status >= SERVER_ERROR:
        raise RegistryAwayError(f"the schema registry {url} answered {status} for schema {number}")
    if len(body) > 2 * MAX_SCHEMA_BYTES:  # twice, since quotes are escaped
        raise UnknownSchemaError(f"expected schema {number} to have at most {MAX_SCHEMA_BYTES:,} bytes, got more")
    content = _parsed(body)
    if status == NOT_FOUND and content.get("error_code") == UNKNOWN_SCHEMA:
        raise UnknownSchemaError(f"expected a schema that the registry {url} has, got its id {number}")
    if status != OK or not isinstance(content.get("schema"), str):
        raise ConfigurationError(
            f"{url} answered {status} for schema {number}, expected a schema registry that asks for no credentials: "
            "set IMAGESTREAM_SCHEMA_REGISTRY to its URL, or give the schema with --payload-schema FILE"
        )
    if (kind := content.get("schemaType", AVRO)) != AVRO:
        raise UnknownSchemaError(f"expected an Avro schema, got schema {number} of type {str(kind)[:20]!r}")
    if content.get("references"):
        raise UnknownSchemaError(f"expected a schema without references, got schema {number}, which refers to others")
    return str(content["schema"])


def _get(url: str, path: str, timeout_s: float) -> tuple[int, bytes]:
    """The status and body of a response; the body is truncated one byte beyond the limit."""
    parts = urlsplit(url)
    kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
    with closing(kind(parts.netloc, timeout=timeout_s)) as connection:
        connection.connect()
        # A socket's timeout restarts with every received byte, so the total time needs a timer.
        over = Event()
        timer = Timer(timeout_s, _shut, [connection.sock, over])
        timer.start()
        try:
            connection.request("GET", parts.path.rstrip("/") + path, headers={"Accept": "application/json"})
            answer = connection.getresponse()
            body = answer.read(2 * MAX_SCHEMA_BYTES + 1)
            if over.is_set():  # a response without a length would seem complete when the timer closes the connection
                raise TimeoutError("the response is too slow")
            return answer.status, body
        finally:
            timer.cancel()


def _shut(connection: socket.socket, over: Event) -> None:
    over.set()
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def _parsed(body: bytes) -> dict[str, Any]:
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
