"""Reads messages that are Avro records: by a schema from a file, or by the id of a registry's schema in their header.

Neither records nor the registry's schemas are trusted. A few bytes of a schema can describe billions of values; a few
bytes of a record can declare a value of exabytes, or an endless number of values. So the size of a schema is limited
before a record is read, and `fastavro` reads a record from an object that limits the number of reads and their sizes.

Source: Apache Avro's specification 1.12, "Binary encoding"; "Wire format" in the documentation of Confluent's Schema
Registry.
"""

import json
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

from streaming.platform.schema_registry import MAX_SCHEMA_BYTES, UnknownSchemaError, fetch_schema

MAX_VALUES = 1_000  # in a schema; a named type counts wherever it is used
MAX_DEPTH = 20  # of nested types
MAX_JSON_DEPTH = 100  # of a schema's text
MAX_READS = 100_000  # per record; a value takes one or more
MAX_SCHEMAS = 100  # cached per worker, of a few MB each
HEADER_BYTES = 5  # a zero byte, and the schema's id in the registry
REASON_CHARS = 100
PRIMITIVES = {"boolean", "int", "long", "float", "double", "bytes", "string", "enum"}
# The attributes that determine the encoding of a record. Logical types are dropped, so that none of their code runs and
# no bytes are converted to a decimal with millions of digits.
KEPT = {"type", "name", "namespace", "fields", "items", "values", "symbols", "size"}

Records = Callable[[bytes], Any]


class RecordError(ValueError):
    """A message is not a record of its schema, or its schema exceeds the limits."""


class Schema:
    """An Avro schema of records.

    Args:
        text: JSON.

    Attributes:
        fields: names of the record's own fields.

    Raises:
        RecordError: it is not the schema of a record, or exceeds the limits.
    """

    fields: list[str]

    def __init__(self, text: str) -> None:
        from fastavro.schema import SchemaParseException, UnknownType, parse_schema

        if len(text) > MAX_SCHEMA_BYTES:
            raise RecordError(f"expected a schema of at most {MAX_SCHEMA_BYTES:,} bytes, got {len(text):,}")
        named: dict[str, Any] = {}
        try:
            schema = json.loads(text, object_hook=_kept)
            _check_json(schema)
            parsed: Any = parse_schema(schema, named)
            _Extent(named).add(parsed)
            self._schema = parsed
            self.fields = [field["name"] for field in parsed["fields"]]
        except RecordError:
            raise
        except (
            SchemaParseException, UnknownType, ValueError, LookupError, TypeError, AttributeError, RecursionError,
        ) as error:  # fmt: skip
            raise RecordError(f"expected an Avro schema of a record: {_short(error)}") from error

    def read(self, data: bytes, start: int = 0) -> Any:
        """Decode the record from `start` to the end of `data`: field → value.

        Raises:
            RecordError: it does not match this schema, or has too many values.
        """
        from fastavro import schemaless_reader

        source = _Source(data, start)
        try:
            record = schemaless_reader(source, self._schema)  # type: ignore[arg-type]
        except RecordError:
            raise
        except (ValueError, LookupError, TypeError, EOFError, StopIteration, OverflowError) as error:
            raise RecordError(f"expected a record of its schema: {_short(error)}") from error
        if left := source.left:
            raise RecordError(f"expected a record of its schema, got {left:,} bytes after it")
        return record


def records_of_file(text: str) -> Records:
    """A reader of records of one schema, with or without a registry's header, whose schema id is ignored.

    Raises:
        RecordError: see `Schema`.
    """
    schema = Schema(text)

    def read(data: bytes) -> Any:
        if data[:1] != b"\0":
            return schema.read(data)
        try:
            return schema.read(data, HEADER_BYTES)
        except RecordError:  # a record without a header may also begin with a zero
            return schema.read(data)

    return read


def records_of_registry(url: str) -> Records:
    """A reader of records with a registry's header; each schema is fetched once."""

    @lru_cache(MAX_SCHEMAS)
    def schema_of(number: int) -> Schema | str:
        text = fetch_schema(url, number)
        try:
            return Schema(text)
        except RecordError as error:
            return str(error)  # the exception itself would keep the parsed schema alive

    def read(data: bytes) -> Any:
        if len(data) < HEADER_BYTES or data[0]:
            raise RecordError("expected a zero byte and a schema id before the Avro record")
        number = int.from_bytes(data[1:HEADER_BYTES], "big")
        try:
            schema = schema_of(number)
        except UnknownSchemaError as error:  # not cached, since the schema may be registered later
            raise RecordError(str(error)) from error
        if isinstance(schema, str):
            raise RecordError(f"schema {number}: {schema}")
        return schema.read(data, HEADER_BYTES)

    return read


class _Source:
    """A file object over a record's bytes for `fastavro`, with limits."""

    def __init__(self, data: bytes, start: int) -> None:
        self._data = data
        self._at = start
        self._reads = 0

    @property
    def left(self) -> int:
        return len(self._data) - self._at

    def read(self, count: int) -> bytes:
        self._reads += 1
        if self._reads > MAX_READS:
            raise RecordError(f"expected a record of at most {MAX_READS:,} values, got more")
        if not 0 <= count <= self.left:
            raise RecordError(f"expected a record of its schema, got {self.left:,} bytes for a value of {count:,}")
        self._at += count
        return self._data[self._at - count : self._at]


class _Extent:
    """Counts the values that a schema describes, with one element per array or map; `named`: full name → type.

    Every type must take at least one byte, so that the size of a record limits the number of its values.
    """

    def __init__(self, named: dict[str, Any]) -> None:
        self._named = named
        self._values = 0

    def add(self, schema: Any, depth: int = 0, *, in_union: bool = False) -> None:
        self._values += 1
        if self._values > MAX_VALUES or depth > MAX_DEPTH:  # also types that contain themselves
            raise RecordError(f"expected a schema of at most {MAX_VALUES:,} values and {MAX_DEPTH} levels, got more")
        if isinstance(schema, list):
            self._add_all(schema, depth, in_union=True)
            return
        kind = schema["type"] if isinstance(schema, dict) else schema
        if kind in PRIMITIVES or (kind == "null" and in_union):
            return
        if kind == "record" and schema["fields"]:
            self._add_all([field["type"] for field in schema["fields"]], depth)
        elif kind in {"array", "map"}:
            self.add(schema["items" if kind == "array" else "values"], depth + 1)
        elif kind == "fixed" and schema["size"] > 0:
            return
        elif kind in self._named:
            self.add(self._named[kind], depth, in_union=in_union)
        else:
            raise RecordError(f"expected types whose values take at least one byte, got {str(kind)[:20]!r}")

    def _add_all(self, schemas: Iterable[Any], depth: int, *, in_union: bool = False) -> None:
        for one in schemas:
            self.add(one, depth + 1, in_union=in_union)


def _kept(one: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in one.items() if key in KEPT}


def _check_json(schema: Any) -> None:
    """Reject a schema that is not of a record, or nested so deeply that `fastavro`'s C code may overflow its stack."""
    if not isinstance(schema, dict) or schema.get("type") != "record":
        raise RecordError(f"expected an Avro schema of a record, got {str(schema)[:40]!r}")
    level: list[Any] = [schema]
    for _ in range(MAX_JSON_DEPTH):
        level = [
            child
            for one in level
            if isinstance(one, dict | list)
            for child in (one.values() if isinstance(one, dict) else one)
        ]
        if not level:
            return
    raise RecordError(f"expected a schema of at most {MAX_JSON_DEPTH} levels of JSON, got more")


def _short(error: BaseException) -> str:
    return f"{type(error).__name__} {' '.join(str(error).split())[:REASON_CHARS]}".strip()
