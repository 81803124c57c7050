"""Schemas from a registry with Confluent's HTTP API.

Source: "GET /schemas/ids/{int: id}" in the API reference of Confluent's Schema Registry; Karapace and Apicurio serve it
as well. A schema never changes under its id, so an answer that is kept need not be asked for again.
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
TIMEOUT_S = 10.0  # for the whole answer
AVRO = "AVRO"  # also where no type is named
OK, NOT_FOUND, BUSY, SERVER_ERROR = 200, 404, 429, 500
UNKNOWN_SCHEMA = 40403  # in the body of a 404: the registry answers, and has no such schema


class UnknownSchemaError(Exception):
    """The registry has no schema of this id that can be used."""


class RegistryAwayError(UnavailableError):
    """The registry does not answer now; it may later."""


def fetch_schema(url: str, number: int, timeout_s: float = TIMEOUT_S) -> str:
    """The Avro schema of an id, as JSON.

    Args:
        url: of the registry, as the setting `schema_registry` has it.
        timeout_s: in seconds, for connecting and again for the whole answer.

    Raises:
        UnknownSchemaError: there is none, or it is not one Avro schema of at most `MAX_SCHEMA_BYTES` bytes.
        RegistryAwayError: no answer in time, or an error of the server.
        ServiceError: what answers is not a schema registry that lets us in.
    """
    try:
        status, body = _get(url, f"/schemas/ids/{number}", timeout_s)
    except (OSError, HTTPException) as error:
        why = str(error) or type(error).__name__
        raise RegistryAwayError(f"the schema registry {url} did not answer within {timeout_s:g} s: {why}") from error
    if status == BUSY or status >= SERVER_ERROR:
        raise RegistryAwayError(f"the schema registry {url} answered {status} for schema {number}")
    if len(body) > 2 * MAX_SCHEMA_BYTES:  # quotes are escaped in it
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
        raise UnknownSchemaError(f"expected a schema in one piece, got schema {number}, which refers to others")
    return str(content["schema"])


def _get(url: str, path: str, timeout_s: float) -> tuple[int, bytes]:
    """Status and body of an answer; the body is cut behind the first byte that is too much."""
    parts = urlsplit(url)
    kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
    with closing(kind(parts.netloc, timeout=timeout_s)) as connection:
        connection.connect()
        # The timeout of a socket starts again with every byte that comes.
        over = Event()
        timer = Timer(timeout_s, _shut, [connection.sock, over])
        timer.start()
        try:
            connection.request("GET", parts.path.rstrip("/") + path, headers={"Accept": "application/json"})
            answer = connection.getresponse()
            body = answer.read(2 * MAX_SCHEMA_BYTES + 1)
            if over.is_set():  # an answer without a length ends where the connection does
                raise TimeoutError("it sends too slowly")
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
