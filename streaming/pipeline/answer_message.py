"""Answers as messages: a row of `predictions` or `quarantine` as the JSON, key and headers of one Kafka message.

The headers are those of CloudEvents in binary mode, as of the images, with the `traceparent` of the image passed on.
The value has every column of the row but those that hold the image's bytes; `answer_schema` describes it.
"""

import base64
import json
from collections.abc import Callable, Mapping
from datetime import UTC, date, datetime
from math import isfinite
from typing import Any, NamedTuple

import pyarrow as pa

from producer.message import (
    HEADER_CONTENT_TYPE,
    HEADER_ID,
    HEADER_SOURCE,
    HEADER_SPEC_VERSION,
    HEADER_TIME,
    HEADER_TRACEPARENT,
    HEADER_TYPE,
    read_headers,
)
from streaming.storage.tables import SCHEMAS

SCHEMA_ID = "urn:imagestream:answer:1"
HEADER_SUBJECT = "ce_subject"  # the image's id
HEADER_SCHEMA = "ce_dataschema"
HEADER_BATCH = "ce_batch"  # the batch's number in its stream
TYPES = {"predictions": "imagestream.prediction", "quarantine": "imagestream.quarantine"}
MADE_AT = {"predictions": "scored_at", "quarantine": "quarantined_at"}
# The image's bytes, which do not fit into a message, what came with them, and what is null as long as a row is new.
LEFT_OUT = {"predictions": frozenset[str](), "quarantine": frozenset({"value", "headers", "replayed_at"})}
MAX_KEY_BYTES = 1024  # a longer key is cut, as in `predictions`


class AnswerMessage(NamedTuple):
    """One message as it goes to the broker; without a key where the image's had none."""

    key: bytes | None
    value: bytes
    headers: list[tuple[str, bytes]]


def answer_fields(table: str) -> list[pa.Field]:
    """The columns of a table that an answer has."""
    return [field for field in SCHEMAS[table][0] if field.name not in LEFT_OUT[table]]


def answer_message(table: str, row: Mapping[str, Any]) -> AnswerMessage:
    """The message about a row.

    Args:
        table: predictions or quarantine.
        row: its columns as Python values, those of `answer_fields`; of `quarantine` the headers too.
    """
    key = row["key"]
    key = None if key is None else key[:MAX_KEY_BYTES]
    trace = row["traceparent"] if "traceparent" in row else read_headers(row["headers"]).traceparent
    value = {"table": table} | {field.name: _finite(row[field.name]) for field in answer_fields(table)} | {"key": key}
    headers = {
        HEADER_SPEC_VERSION: "1.0",
        HEADER_TYPE: TYPES[table],
        HEADER_SOURCE: f"/streams/{row['query_id']}",
        HEADER_ID: f"{row['topic']}/{row['partition']}/{row['offset']}",
        HEADER_SUBJECT: row["image_id"],
        HEADER_TIME: _as_text(made_at) if (made_at := row[MADE_AT[table]]) else None,
        HEADER_SCHEMA: SCHEMA_ID,
        HEADER_BATCH: str(row["batch_id"]),
        HEADER_CONTENT_TYPE: "application/json",
        HEADER_TRACEPARENT: trace,
    }
    encoded = [(name, text.encode()) for name, text in headers.items() if text is not None]
    data = json.dumps(value, default=_as_text, separators=(",", ":"), ensure_ascii=False)
    return AnswerMessage(key, data.encode(), encoded)


def _finite(value: Any) -> Any:
    """A value with null in place of numbers that JSON does not have."""
    if isinstance(value, float):
        return value if isfinite(value) else None
    if isinstance(value, list):
        return [_finite(one) for one in value]
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    return value


def _as_text(value: datetime | date | bytes) -> str:
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
    return value.isoformat()


def answer_schema() -> dict[str, Any]:
    """The JSON Schema of the values; published as docs/answers.schema.json."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": SCHEMA_ID,
        "title": "Answer of imagestream: a row of the table predictions or quarantine",
        "oneOf": [_object({"table": {"const": table}}, answer_fields(table)) for table in TYPES],
    }


def _object(first: Mapping[str, Any], fields: list[pa.Field]) -> dict[str, Any]:
    properties = {**first, **{field.name: _schema_of(field.type) for field in fields}}
    return {"type": "object", "required": list(properties), "properties": properties}


def _schema_of(kind: pa.DataType) -> dict[str, Any]:
    """The JSON Schema of a column, any of which may be null."""
    if pa.types.is_list(kind):
        return {"type": ["array", "null"], "items": _object({}, list(kind.value_type))}
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
