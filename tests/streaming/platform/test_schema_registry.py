"""Schemas are fetched within limits, and registered under a subject; the registry is a server on loopback."""

import json
import threading

import pytest

from streaming.errors import ServiceError
from streaming.platform.schema_registry import (
    MAX_SCHEMA_BYTES,
    RegistryAwayError,
    UnknownSchemaError,
    fetch_schema,
    register_schema,
)
from tests.streaming.schema_server import UNKNOWN, Answer, error_answer, schema_answer, schema_server

SCHEMA = '{"type": "string"}'


def test_schema_is_fetched_by_its_id_below_the_path_of_the_registry() -> None:
    with schema_server(lambda number: schema_answer({"is": number}, schemaType="AVRO", references=[])) as registry:
        assert json.loads(fetch_schema(f"{registry.url}/api/", 2**32 - 1)) == {"is": 2**32 - 1}
        assert registry.asked == ["/api/schemas/ids/4294967295"]


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (UNKNOWN, UnknownSchemaError, "expected a schema id that the registry http.* knows, got 7"),
        (schema_answer("x", schemaType="PROTOBUF"), UnknownSchemaError, "expected an Avro .* 7 of type 'PROTOBUF'"),
        (schema_answer("x", references=[{"name": "a"}]), UnknownSchemaError, "7, which refers to others"),
        (schema_answer("x" * 2 * MAX_SCHEMA_BYTES), UnknownSchemaError, "7 to have at most 262,144 bytes, got more"),
        ((404, b"<html>"), ServiceError, "answered 404 for schema 7, expected a schema registry"),
        ((401, b"{}"), ServiceError, "answered 401 .* requires no credentials: set IMAGESTREAM_SCHEMA_REGISTRY"),
        ((200, b"[" * 100_000), ServiceError, "answered 200 for schema 7, expected a schema registry"),
        ((200, b'{"schema": 1}'), ServiceError, "answered 200 for schema 7, expected a schema registry"),
        ((503, b""), RegistryAwayError, "the schema registry http.* answered 503 for schema 7"),
        ((429, b""), RegistryAwayError, "answered 429"),
    ],
    ids=lambda value: str(value[0]) if isinstance(value, tuple) else None,
)
def test_response_without_a_schema_is_an_error_with_the_reason(
    answer: Answer, error: type[Exception], message: str
) -> None:
    with schema_server(lambda _: answer) as registry, pytest.raises(error, match=message) as caught:
        fetch_schema(registry.url, 7)
    assert "\n" not in str(caught.value)


def test_slow_or_missing_registry_is_unavailable() -> None:
    drip = threading.Event()
    with schema_server(lambda _: UNKNOWN, drip=drip) as registry:
        with pytest.raises(RegistryAwayError, match=r"did not answer within 0\.5 s"):
            fetch_schema(registry.url, 7, timeout_s=0.5)
        drip.set()
    with pytest.raises(RegistryAwayError, match="did not answer within .* refused"):
        fetch_schema(registry.url, 7)


def test_schema_is_registered_once_and_then_looked_up() -> None:
    with schema_server() as registry:
        numbers = [register_schema(registry.url, subject, SCHEMA) for subject in ("a-value", "b/ü", "a-value")]
        assert numbers == [1, 1, 1]
        assert registry.subjects == {"a-value": {1}, "b/ü": {1}}
        assert registry.asked == [
            "/subjects/a-value", "/subjects/a-value/versions", "/subjects/b%2F%C3%BC", "/subjects/b%2F%C3%BC/versions",
            "/subjects/a-value",
        ]  # fmt: skip
        assert fetch_schema(registry.url, 1) == SCHEMA


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (
            error_answer(409, 409, "Schema being registered is incompatible\n with an earlier schema"),
            ServiceError,
            r"another schema under subject 'a-value', which .* not compatible with \(Schema being registered is "
            r"incompatible with an earlier schema\): choose another topic, or delete the subject",
        ),
        (
            error_answer(401, 40101, "Unauthorized"),
            ServiceError,
            r"answered 401 for subject 'a-value' \(Unauthorized\)",
        ),
        ((404, b"<html>"), ServiceError, "answered 404 for subject 'a-value', expected a schema registry that accepts"),
        ((200, b'{"id": true}'), ServiceError, "answered 200 for subject 'a-value', expected a schema registry"),
        ((200, b'{"id": 4294967296}'), ServiceError, "answered 200 for subject 'a-value', expected a schema registry"),
        ((503, b""), RegistryAwayError, "answered 503 for subject 'a-value'"),
    ],
    ids=lambda value: str(value[0]) if isinstance(value, tuple) else None,
)
def test_failed_registration_is_a_one_line_error(answer: Answer, error: type[Exception], message: str) -> None:
    with schema_server(post=lambda _path, _schema: answer) as registry, pytest.raises(error, match=message) as caught:
        register_schema(registry.url, "a-value", SCHEMA)
    assert "\n" not in str(caught.value)
