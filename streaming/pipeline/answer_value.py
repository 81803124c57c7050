"""The value of an answer: the columns of a row of `predictions` or `quarantine`, and their encoding as JSON.

A value has every column of the row except those that hold the image's bytes; `json_schema` describes it. Avro records
with the same values are in `streaming/pipeline/answer_avro.py`.
"""

import base64
import json
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, date, datetime
from functools import cache
from math import isfinite
from typing import Any

import pyarrow as pa

from streaming.storage.tables import SCHEMAS

SCHEMA_ID = "urn:imagestream:answer:1"
ANSWERED_TABLES = ("predictions", "quarantine")  # whose rows can be sent as answers
# The image's bytes, which are too large for a message, its headers, and what is null as long as a row is new.
LEFT_OUT = {"predictions": frozenset[str](), "quarantine": frozenset({"value", "headers", "replayed_at"})}
MAX_KEY_BYTES = 1024  # a longer key is cut, as in `predictions`


@cache  # called for each answer
def answer_fields(table: str) -> tuple[pa.Field, ...]:
    """The columns of a table that an answer has."""
    return tuple(field for field in SCHEMAS[table][0] if field.name not in LEFT_OUT[table])


def answer_value(table: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """`table` and the columns of an answer as Python values: numbers that are not finite are None, the key is cut.

    Args:
        table: predictions or quarantine.
        row: the columns of `answer_fields` as Python values; a date that names a partition is text.
    """
    value = {"table": table} | {field.name: _finite(row[field.name]) for field in answer_fields(table)}
    if value["key"] is not None:
        value["key"] = value["key"][:MAX_KEY_BYTES]
    if isinstance(value.get("date"), str):
        value["date"] = date.fromisoformat(value["date"])
    return value


def json_value(value: Mapping[str, Any]) -> bytes:
    """An `answer_value` as JSON: times in UTC with microseconds, bytes in base64."""
    return json.dumps(value, default=as_text, separators=(",", ":"), ensure_ascii=False).encode()


def as_text(value: datetime | date | bytes) -> str:
    """The text that represents a value of a type that JSON does not have."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
    return value.isoformat()


def json_schema() -> dict[str, Any]:
    """The JSON Schema of the values; published as docs/answers.schema.json."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": SCHEMA_ID,
        "title": "Answer of imagestream: a row of the table predictions or quarantine",
        "oneOf": [_object({"table": {"const": table}}, answer_fields(table)) for table in ANSWERED_TABLES],
    }


def _finite(value: Any) -> Any:
    """A value with None in place of numbers that JSON does not have."""
    if isinstance(value, float):
        return value if isfinite(value) else None
    if isinstance(value, list):
        return [_finite(one) for one in value]
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    return value


def _object(first: Mapping[str, Any], fields: Iterable[pa.Field]) -> dict[str, Any]:
    properties = {**first, **{field.name: _schema_of(field.type) for field in fields}}
    return {"type": "object", "required": list(properties), "properties": properties}


def _schema_of(kind: pa.DataType) -> dict[str, Any]:
    """The JSON Schema of a column, any of which may be null."""
    if pa.types.is_list(kind):
        return {"type": ["array", "null"], "items": _object({}, kind.value_type)}
    formats: dict[Callable[[pa.DataType], bool], dict[str, Any]] = {
        pa.types.is_timestamp: {"type": ["string", "null"], "format": "date-time"},
        pa.types.is_date: {"type": ["string", "null"], "format": "date"},
        pa.types.is_binary: {"type": ["string", "null"], "contentEncoding": "base64"},
        pa.types.is_boolean: {"type": ["boolean", "null"]},
        pa.types.is_integer: {"type": ["integer", "null"]},
        pa.types.is_floating: {"type": ["number", "null"]},
        pa.types.is_string: {"type": ["string", "null"]},
    }
    return next(schema for test, schema in formats.items() if test(kind))
