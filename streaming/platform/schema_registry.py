"""Schemas in a registry with Confluent's HTTP API: fetched by id, or registered under a subject.

A schema never changes under its id, so it can be cached.

Source: "GET /schemas/ids/{int: id}", "POST /subjects/(string: subject)" and "POST /subjects/(string: subject)/versions"
in the API reference of Confluent's Schema Registry; Karapace and Apicurio serve them as well.
"""

import json
import socket
from contextlib import closing, suppress
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from threading import Event, Timer
from typing import Any
from urllib.parse import quote, urlsplit

from streaming.errors import ConfigurationError, UnavailableError

MAX_SCHEMA_BYTES = 256 * 1024
TIMEOUT_S = 10.0  # for the whole response
MESSAGE_CHARS = 200  # of a registry's own message
AVRO = "AVRO"  # the default type
CONTENT_TYPE = "application/vnd.schemaregistry.v1+json"
OK, NOT_FOUND, CONFLICT, BUSY, SERVER_ERROR = 200, 404, 409, 429, 500
MAX_ID = 2**31 - 1
UNKNOWN_SCHEMA = 40403  # in the body of a 404 for an unknown schema id


class UnknownSchemaError(Exception):
    """The registry has no usable schema with this id."""


class RegistryAwayError(UnavailableError):
    """The registry does not answer at the moment; a later attempt may succeed."""


def fetch_schema(url: str, number: int, timeout_s: float = TIMEOUT_S) -> str:
    """Fetch an Avro schema by its id, as JSON.

    Args:
        url: of the registry, see the setting `schema_registry`.
        number: the schema's id.
        timeout_s: for connecting, and again for the whole response.

    Raises:
        UnknownSchemaError: it does not exist, or is not a self-contained Avro schema of at most `MAX_SCHEMA_BYTES`
        bytes.
        RegistryAwayError: there was no response in time, or a server error.
        ServiceError: the URL is not that of a schema registry without authentication.
    """
    status, body = _checked_request(url, f"/schemas/ids/{number}", f"schema {number}", timeout_s)
    if len(body) > 2 * MAX_SCHEMA_BYTES:  # quotes are escaped in it
        raise UnknownSchemaError(f"expected schema {number} to have at most {MAX_SCHEMA_BYTES:,} bytes, got more")
    content = _parsed(body)
    if status == NOT_FOUND and content.get("error_code") == UNKNOWN_SCHEMA:
        raise UnknownSchemaError(f"expected a schema id that the registry {url} knows, got {number}")
    if status != OK or not isinstance(content.get("schema"), str):
        raise ConfigurationError(
            f"{url} answered {status} for schema {number}, expected a schema registry that requires no credentials: "
            "set IMAGESTREAM_SCHEMA_REGISTRY to its URL, or give the schema with --payload-schema FILE"
        )
    if (kind := content.get("schemaType", AVRO)) != AVRO:
        raise UnknownSchemaError(f"expected an Avro schema, got schema {number} of type {str(kind)[:20]!r}")
    if content.get("references"):
        raise UnknownSchemaError(f"expected a schema without references, got schema {number}, which refers to others")
    return str(content["schema"])


def register_schema(url: str, subject: str, schema: str, timeout_s: float = TIMEOUT_S) -> int:
    """The id of an Avro schema under a subject, which is registered if it does not exist.

    Args:
        url: of the registry, see the setting `schema_registry`.
        schema: as JSON.
        timeout_s: in seconds, for connecting and again for the whole response.

    Raises:
        RegistryAwayError: no response in time, or an error of the server.
        ServiceError: the subject has a schema that this one is not compatible with, or the registry rejects it.
    """
    what, body = f"subject {subject!r}", json.dumps({"schema": schema}).encode()
    path = f"/subjects/{quote(subject, safe='')}"
    # Looked up first, which requires permission to read only and works with a read-only registry.
    status, answer = _checked_request(url, path, what, timeout_s, body)
    if status == NOT_FOUND:
        status, answer = _checked_request(url, f"{path}/versions", what, timeout_s, body)
    content = _parsed(answer)
    number = content.get("id")
    if status == OK and isinstance(number, int) and not isinstance(number, bool) and 0 <= number <= MAX_ID:
        return number
    why = " ".join(str(content.get("message", "")).split())[:MESSAGE_CHARS]
    if status == CONFLICT:
        raise ConfigurationError(
            f"the schema registry {url} has another schema under {what}, which the one of this release is not "
            f"compatible with ({why}): choose another topic, or delete the subject"
        )
    raise ConfigurationError(
        f"{url} answered {status} for {what}{f' ({why})' if why else ''}, expected a schema registry that accepts "
        "schemas without credentials: set IMAGESTREAM_SCHEMA_REGISTRY to its URL"
    )


def _checked_request(url: str, path: str, what: str, timeout_s: float, body: bytes | None = None) -> tuple[int, bytes]:
    """Status and body of a response that is about the request, and not about the state of the registry."""
    try:
        status, answer = _request(url, path, timeout_s, body)
    except (OSError, HTTPException) as error:
        why = str(error) or type(error).__name__
        raise RegistryAwayError(f"the schema registry {url} did not answer within {timeout_s:g} s: {why}") from error
    if status == BUSY or status >= SERVER_ERROR:
        raise RegistryAwayError(f"the schema registry {url} answered {status} for {what}")
    return status, answer


def _request(url: str, path: str, timeout_s: float, body: bytes | None) -> tuple[int, bytes]:
    """Status and body of the response to a GET, or to a POST of `body`; cut after the first byte beyond the limit."""
    parts = urlsplit(url)
    kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
    with closing(kind(parts.netloc, timeout=timeout_s)) as connection:
        connection.connect()
        # A socket's timeout restarts with every received byte, so the total time needs a timer.
        over = Event()
        timer = Timer(timeout_s, _shut, [connection.sock, over])
        timer.start()
        try:
            headers = {"Accept": "application/json"} | ({"Content-Type": CONTENT_TYPE} if body is not None else {})
            connection.request("GET" if body is None else "POST", parts.path.rstrip("/") + path, body, headers)
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
