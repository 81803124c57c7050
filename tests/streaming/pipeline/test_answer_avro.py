"""Answers as Avro records: readable by fastavro with the published schema, and convertible to the JSON of the row."""

import json
from datetime import UTC, date, datetime, timedelta
from io import BytesIO
from typing import Any

import pytest
from fastavro import parse_schema, schemaless_reader, schemaless_writer
from fastavro.schema import fingerprint, to_parsing_canonical_form

from streaming.pipeline.answer_avro import avro_rows, avro_schema, avro_text, avro_value
from streaming.pipeline.answer_message import answer_message
from streaming.pipeline.answer_value import ANSWERED_TABLES, MAX_KEY_BYTES, answer_fields, answer_value, json_value
from streaming.pipeline.avro import RecordError
from streaming.platform.schema_registry import register_schema
from tests.conftest import CHECKOUT
from tests.streaming.schema_server import schema_server

PUBLISHED = json.loads((CHECKOUT / "docs" / "answers.avsc").read_text(encoding="utf-8"))
TIME = datetime(2026, 1, 2, 3, 4, 5, 678_901, UTC)
FINGERPRINT = "300b4e1ea21c8c1d"  # pragma: allowlist secret
MAX_ID = 2**31 - 1
ROWS: dict[str, dict[str, Any]] = {
    "predictions": {
        "image_id": "ü", "topic": "images", "partition": 2**31 - 1, "offset": 2**63 - 1, "published_at": TIME,
        "source": "a b.jpg", "label_true": None, "key": b"\xff" * (MAX_KEY_BYTES + 1), "timestamp_ms": -1,
        "label": "cat", "confidence": 0.75, "top_k": [{"label": "cat", "probability": float("nan")}],
        "scored_at": TIME.astimezone(None), "model_version": 3, "bundle_sha256": "ab", "query_id": "q", "batch_id": 9,
        "date": "2026-01-02", "damaged": True, "traceparent": None,
    },
    "quarantine": dict.fromkeys([field.name for field in answer_fields("quarantine")])
    | {"image_id": "x", "topic": "images", "partition": 0, "offset": 7, "query_id": "q", "batch_id": 1, "headers": None,
       "quarantined_at": datetime(1, 1, 1, tzinfo=UTC), "stage": "decode", "reason": "truncated"},
}  # fmt: skip


def test_published_schema_matches_records_and_format_3_decisions() -> None:
    assert avro_schema() == PUBLISHED
    # Decisions of format 3 imply this schema: another schema needs another format.
    assert fingerprint(to_parsing_canonical_form(parse_schema(PUBLISHED)), "CRC-64-AVRO") == FINGERPRINT


@pytest.mark.parametrize("schema_id", [None, MAX_ID])
@pytest.mark.parametrize("table", ANSWERED_TABLES)
def test_record_has_the_row_values(table: str, schema_id: int | None) -> None:
    message = answer_message(table, ROWS[table], "avro", schema_id)
    header = b"\0\x7f\xff\xff\xff" if schema_id else b"\xc3\x01" + bytes.fromhex(FINGERPRINT)
    assert message.value.startswith(header)
    source = BytesIO(message.value[len(header) :])
    record = schemaless_reader(source, parse_schema(PUBLISHED), None)
    assert not source.read()
    assert isinstance(record, dict)
    value = answer_value(table, ROWS[table])
    others = {field.name for one in ANSWERED_TABLES for field in answer_fields(one)} - value.keys()
    assert record == value | dict.fromkeys(others)
    if table == "predictions":
        assert (record["scored_at"], record["date"]) == (TIME, date(2026, 1, 2))
        assert record["top_k"] == [{"label": "cat", "probability": None}]
    headers = dict(message.headers)
    assert (headers["content-type"], headers["ce_dataschema"]) == (
        b"application/avro",
        b"urn:imagestream:answer-avro:1",
    )


def test_records_decode_to_the_json_of_their_rows() -> None:
    with schema_server() as registry:
        id_ = register_schema(registry.url, "answers-value", avro_text())
        read = avro_rows(registry.url)
        for table in ANSWERED_TABLES:
            expected = answer_message(table, ROWS[table]).value
            for schema_id in (id_, None):
                assert json_value(read(answer_message(table, ROWS[table], "avro", schema_id).value)) == expected
        assert registry.asked.count(f"/schemas/ids/{id_}") == 1


def record(**values: object) -> bytes:
    """A record of another schema with these fields, in Confluent's wire format with id 1."""
    data = BytesIO()
    schemaless_writer(data, json.loads(SIMILAR), dict.fromkeys(("table", "scored_at", "date"), None) | values)
    return b"\0\0\0\0\1" + data.getvalue()


SIMILAR = json.dumps(
    {
        "type": "record", "name": "Answer", "namespace": "imagestream",
        "fields": [
            {"name": name, "type": ["null", "long", "string"]} for name in ("table", "scored_at", "date")
        ],
    }
)  # fmt: skip


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "expected a zero byte and a schema id"),
        (b'{"table": "predictions"}', "expected a zero byte and a schema id"),
        (b"\xc3\x01" + bytes(8), f"expected a record of schema {FINGERPRINT}, got schema 0{{16}} of another release"),
        (b"\xc3\x01", f"expected a record of schema {FINGERPRINT}, got schema  of another release"),
        (avro_value(answer_value("predictions", ROWS["predictions"]), None)[:-1], "expected a record of its schema"),
        (avro_value(answer_value("predictions", ROWS["predictions"]), None) + b"x", "got 1 bytes after it"),
        (b"\0\0\0\0\2", "expected a schema id that the registry http.* knows, got 2"),
        (record(), "expected the field 'table' to be predictions or quarantine, got 'None'"),
        (record(table="labels"), "expected the field 'table' to be .*, got 'labels'"),
        (record(table="predictions", scored_at=2**62), "expected a time in 'scored_at', got '4611686018427387904'"),
        (record(table="predictions", date="now"), "expected a time in 'date', got 'now'"),
    ],
)
def test_invalid_answer_is_reported_in_one_line(data: bytes, message: str) -> None:
    with schema_server() as registry:
        register_schema(registry.url, "answers-value", SIMILAR)
        with pytest.raises(RecordError, match=message) as caught:
            avro_rows(registry.url)(data)
    assert "\n" not in str(caught.value)


def test_missing_schema_registry_setting_is_named() -> None:
    with pytest.raises(RecordError, match="its schema is in a schema registry: set --schema-registry or IMAGESTREAM_"):
        avro_rows(None)(b"\0\0\0\0\1x")
    with pytest.raises(RecordError, match="expected an Avro record with the id or fingerprint of its schema, got 7b7d"):
        avro_rows(None)(b"{}")


def test_columns_of_another_release_are_null_or_omitted() -> None:
    with schema_server() as registry:
        register_schema(registry.url, "answers-value", SIMILAR)
        found = avro_rows(registry.url)(record(table="predictions", scored_at=1))
    assert (found["scored_at"], found["label"]) == (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=1), None)
