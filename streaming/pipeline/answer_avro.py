"""Answers as Avro records: one record schema for both tables, and the two encodings that identify it.

With a schema registry, a value has Confluent's wire format: a zero, the schema's id in 4 bytes, the record. Without
one, it has Avro's single-object encoding: C3 01, the CRC-64-AVRO fingerprint of the schema in 8 bytes, the record.

A record has the columns of both tables, null where the row's table does not have them, so that a topic with both tables
has one schema under one subject. Every column has the default null, so that a schema with more columns is compatible.

Source: Apache Avro's specification 1.12, "Single-object encoding" and "Transforming into Parsing Canonical Form"; "Wire
format" in the documentation of Confluent's Schema Registry.
"""

import json
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from functools import cache
from io import BytesIO
from typing import Any

import pyarrow as pa

from streaming.pipeline.answer_value import ANSWERED_TABLES, answer_fields
from streaming.pipeline.avro import HEADER_BYTES, RecordError, Records, Schema, records_of_registry

SCHEMA_ID = "urn:imagestream:answer-avro:1"
NAMESPACE, NAME = "imagestream", "Answer"
SINGLE_OBJECT = b"\xc3\x01"
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def avro_schema() -> dict[str, Any]:
    """The Avro schema of the values; published as docs/answers.avsc."""
    fields = {field.name: field for table in ANSWERED_TABLES for field in answer_fields(table)}
    return {
        "type": "record",
        "namespace": NAMESPACE,
        "name": NAME,
        "doc": "A row of the table predictions or quarantine; columns that its table does not have are null.",
        "fields": [
            {"name": "table", "type": "string"},
            *(_nullable(field.name, _type_of(field.name, field.type)) for field in fields.values()),
        ],
    }


def avro_text() -> str:
    """The schema as it is registered: JSON without white space."""
    return json.dumps(avro_schema(), separators=(",", ":"))


def avro_value(value: Mapping[str, Any], schema_id: int | None) -> bytes:
    """The encoded record of an answer.

    Args:
        value: the result of `answer_value`.
        schema_id: of the schema in the registry; None for single-object encoding.
    """
    from fastavro import schemaless_writer

    data = BytesIO()
    data.write(_header() if schema_id is None else b"\0" + schema_id.to_bytes(HEADER_BYTES - 1, "big"))
    schemaless_writer(data, _parsed(), dict(value))
    return data.getvalue()


def has_schema_id(data: bytes) -> bool:
    """Whether an encoded record is in Confluent's wire format."""
    return data[:1] == b"\0"


def avro_rows(registry: str | None) -> Callable[[bytes], dict[str, Any]]:
    """A function from an encoded record to `table` and the columns of its row, as in the result of `answer_value`.

    It raises a RecordError if the bytes are not an answer, and a RegistryAwayError if the registry does not respond.

    Args:
        registry: URL of the schema registry, which values in Confluent's wire format are read with.
    """
    single, registered = _single_object(), records_of_registry(registry) if registry else _without_registry

    def row_of(data: bytes) -> dict[str, Any]:
        return _row((single if data.startswith(SINGLE_OBJECT) else registered)(data))

    return row_of


def _single_object() -> Records:
    schema, header = Schema(avro_text()), _header()

    def read(data: bytes) -> Any:
        if not data.startswith(header):
            found = data[len(SINGLE_OBJECT) : len(header)].hex()
            raise RecordError(f"expected a record of schema {header[2:].hex()}, got schema {found} of another release")
        return schema.read(data, len(header))

    return read


def _without_registry(data: bytes) -> Any:
    if has_schema_id(data):
        raise RecordError("its schema is in a schema registry: set --schema-registry or IMAGESTREAM_SCHEMA_REGISTRY")
    raise RecordError(f"expected an Avro record with the id or fingerprint of its schema, got {data[:8].hex()}…")


def _row(record: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of the record's table; logical types are decoded here, since `Schema` leaves them out."""
    table = record.get("table")
    if table not in ANSWERED_TABLES:
        raise RecordError(f"expected the field 'table' to be {' or '.join(ANSWERED_TABLES)}, got {str(table)[:40]!r}")
    row = {field.name: _decoded(record.get(field.name), field) for field in answer_fields(table)}
    return {"table": table} | row


def _decoded(value: Any, field: pa.Field) -> Any:
    if value is None or not (pa.types.is_timestamp(field.type) or pa.types.is_date(field.type)):
        return value
    try:
        if pa.types.is_timestamp(field.type):
            return EPOCH + timedelta(microseconds=value)
        return EPOCH.date() + timedelta(days=value)
    except (TypeError, OverflowError) as error:
        raise RecordError(f"expected a time in {field.name!r}, got {str(value)[:40]!r}") from error


@cache
def _parsed() -> Any:
    from fastavro import parse_schema

    return parse_schema(avro_schema())


@cache
def _header() -> bytes:
    from fastavro.schema import fingerprint, to_parsing_canonical_form

    return SINGLE_OBJECT + bytes.fromhex(fingerprint(to_parsing_canonical_form(_parsed()), "CRC-64-AVRO"))


def _nullable(name: str, kind: Any) -> dict[str, Any]:
    return {"name": name, "type": ["null", kind], "default": None}


def _type_of(name: str, kind: pa.DataType) -> Any:
    """The Avro type of a column."""
    if pa.types.is_list(kind):
        fields = [_nullable(field.name, _type_of(field.name, field.type)) for field in kind.value_type]
        record = "".join(part.capitalize() for part in name.split("_"))
        return {"type": "array", "items": {"type": "record", "name": record, "fields": fields}}
    types: dict[Callable[[pa.DataType], bool], Any] = {
        pa.types.is_timestamp: {"type": "long", "logicalType": "timestamp-micros"},
        pa.types.is_date: {"type": "int", "logicalType": "date"},
        pa.types.is_binary: "bytes",
        pa.types.is_boolean: "boolean",
        pa.types.is_int32: "int",
        pa.types.is_int64: "long",
        pa.types.is_float32: "float",
        pa.types.is_float64: "double",
        pa.types.is_string: "string",
    }
    return next(found for test, found in types.items() if test(kind))
