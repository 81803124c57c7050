"""Images in Avro records, with an untrusted schema from a file or from a registry on loopback."""

import base64
import io
import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from fastavro import schemaless_writer
from kafka import KafkaProducer

from streaming.errors import ServiceError
from streaming.images.dataset import digit_images
from streaming.pipeline.avro import MAX_READS, RecordError, Schema
from streaming.pipeline.payload import FrameError, Payload, chosen_payload, unwrapper
from streaming.settings import Settings
from tests.faults.harness import drain, rows
from tests.streaming.schema_server import UNKNOWN, Answer, schema_answer, schema_server

IMAGE = b"\x89PNG\r\n\x1a\n and so on"
INNER = {"type": "record", "name": "Inner", "fields": [{"name": "data", "type": ["null", "bytes"], "default": None}]}
FIELDS = [
    {"name": "camera", "type": "string", "doc": "which"},
    {"name": "taken", "type": {"type": "long", "logicalType": "timestamp-millis"}},
    {"name": "frame", "type": ["null", INNER]},
    {"name": "other", "type": ["null", "Inner"]},
    {"name": "text", "type": "string"},
    {"name": "boxes", "type": {"type": "array", "items": "boolean"}},
    {"name": "image", "type": {"type": "bytes", "logicalType": "decimal", "precision": 4}},
]
SCHEMA = {"type": "record", "name": "Shot", "namespace": "example.shots", "fields": FIELDS}
PLAIN = {**SCHEMA, "fields": [*FIELDS[:-1], {"name": "image", "type": "bytes"}]}
SHOT = {
    "camera": "",
    "taken": 1_700_000_000_000,
    "frame": {"data": IMAGE},
    "other": None,
    "text": base64.b64encode(IMAGE).decode(),
    "boxes": [True, False],
    "image": IMAGE,
}
HEADER = b"\0\0\0\0\x2a"


def encoded(shot: dict[str, Any], schema: Any = PLAIN) -> bytes:
    out = io.BytesIO()
    schemaless_writer(out, schema, shot)
    return out.getvalue()


RECORD = encoded(SHOT)


def unwrap(payload: Payload, data: bytes) -> bytes:
    unwrapped = unwrapper(payload)
    assert unwrapped is not None
    return unwrapped(data)


@pytest.mark.parametrize("field", ["image", "text", "frame.data"])
@pytest.mark.parametrize("header", [b"", HEADER], ids=["bare", "with a header"])
def test_image_is_extracted_with_the_schema_of_a_file(tmp_path: Path, header: bytes, field: str) -> None:
    file = tmp_path / "shot.avsc"
    file.write_text(json.dumps(SCHEMA))
    assert unwrap(chosen_payload(f"avro:{field}", file), header + RECORD) == IMAGE  # RECORD begins with a zero byte


def test_schemas_are_cached_and_unknown_ones_requested_again() -> None:
    answers = {42: schema_answer(SCHEMA), 43: schema_answer("int")}
    with schema_server(lambda number: answers.get(number, UNKNOWN)) as registry:
        payload = chosen_payload("avro:image", registry=registry.url)
        for _ in range(2):
            assert unwrap(payload, HEADER + RECORD) == IMAGE
            with pytest.raises(FrameError, match="schema 43: expected an Avro schema of a record, got 'int'"):
                unwrap(payload, b"\0\0\0\0\x2b" + RECORD)
            with pytest.raises(FrameError, match="expected a schema id that the registry .* knows, got 44"):
                unwrap(payload, b"\0\0\0\0\x2c" + RECORD)
        for data in (b"", b"\0\0\0\0", IMAGE):
            with pytest.raises(FrameError, match="expected a zero byte and a schema id before the Avro record"):
                unwrap(payload, data)
        assert registry.asked == [f"/schemas/ids/{number}" for number in (42, 43, 44, 44)]


MANY_BOOLEANS = RECORD[: -len(IMAGE) - 4] + b"\xfe\xff\xff\xff\x0f" + b"\x01" * 2 * MAX_READS


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "got 0 bytes for a value of 1"),
        (RECORD[:-1], f"got {len(IMAGE) - 1} bytes for a value of {len(IMAGE)}"),
        (RECORD + b"x", "got 1 bytes after it"),
        (b"\x02\xff" + RECORD[1:], "UnicodeDecodeError"),
        (b"\xff\xff\xff\xff\x0f", "bytes for a value of -2,147,483,648"),
        (b"\0\0\x0e" + RECORD, "IndexError"),  # an index into a union
        (b"\0\0\x00\x00\x00" + b"\xff" * 8 + b"\x7f\x01\x01", "for a value of 1"),  # endless booleans
        (MANY_BOOLEANS, f"a record of at most {MAX_READS:,} values"),
    ],
    ids=["empty", "truncated", "longer", "not UTF-8", "negative", "invalid branch", "endless", "millions"],
)
def test_invalid_record_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(RecordError, match=message) as caught:
        Schema(json.dumps(SCHEMA)).read(data)
    assert "\n" not in str(caught.value)


def record_of(*types: object) -> dict[str, Any]:
    """A schema with a field of each type."""
    fields = [{"name": f"f{number}", "type": one} for number, one in enumerate(types)]
    return {"type": "record", "name": f"R{len(str(types))}", "fields": fields}


def exponential() -> dict[str, Any]:
    """Ten levels of ten values each: ten billion values in a few hundred bytes."""
    types: list[object] = [record_of("int") | {"name": "L0"}]
    types += [record_of(*[f"L{level}"] * 10) | {"name": f"L{level + 1}"} for level in range(10)]
    return record_of(*types)


def nested(depth: int) -> object:
    kind: object = "int"
    for _ in range(depth):
        kind = {"type": "array", "items": kind}
    return kind


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "JSONDecodeError"),
        ("[" * 100_000, "RecursionError|got '\\["),
        (json.dumps(SCHEMA) + " " * 300_000, "a schema of at most 262,144 bytes"),
        *[
            (json.dumps(schema), message)
            for schema, message in [
                ("bytes", "an Avro schema of a record, got 'bytes'"),
                (["null", "bytes"], "an Avro schema of a record, got"),
                ({"type": "record"}, '"name" is a required field'),
                ({"type": "record", "__fastavro_parsed": True, "__named_schemas": {}}, '"name" is a required field'),
                (record_of("Nowhere"), "UnknownType Nowhere"),
                (record_of(["null", record_of("int") | {"name": "R15"}, "R15"], 7), "TypeError"),
                (record_of({"type": "fixed", "name": "F", "size": "x"}), "TypeError"),
                (record_of({"type": "fixed", "name": "F", "size": 0}), "at least one byte, got 'fixed'"),
                (record_of({"type": "array", "items": "null"}), "at least one byte, got 'null'"),
                (record_of({"type": "map", "values": record_of()}), "at least one byte, got 'record'"),
                (record_of(nested(40)), "1,000 values and 20 levels"),
                (record_of(nested(200)), "at most 100 levels of JSON"),
                (record_of(["null", "R30"]) | {"name": "R30"}, "1,000 values and 20 levels"),  # contains itself
                (exponential(), "1,000 values and 20 levels"),
            ]
        ],
    ],
)
def test_invalid_or_oversized_schema_is_refused(text: str, message: str) -> None:
    with pytest.raises(RecordError, match=message) as caught:
        Schema(text)
    assert "\n" not in str(caught.value)


def test_invalid_payload_options_are_refused_before_the_start(tmp_path: Path) -> None:
    file = tmp_path / "shot.avsc"
    with pytest.raises(ServiceError, match="add --payload-schema FILE, or set IMAGESTREAM_SCHEMA_REGISTRY to the URL"):
        chosen_payload("avro:image")
    with pytest.raises(ServiceError, match=r"--payload-schema .*shot\.avsc: .*No such file"):
        chosen_payload("avro:image", file)
    file.write_bytes(b"\xff")
    with pytest.raises(ServiceError, match=r"--payload-schema .*shot\.avsc: .*can't decode"):
        chosen_payload("avro:image", file)
    file.write_text(json.dumps(SCHEMA))
    with pytest.raises(ServiceError, match="expected a record with the field 'img', got one with camera, taken"):
        chosen_payload("avro:img.data", file)
    with pytest.raises(ServiceError, match="expected with --payload avro:FIELD only, got --payload base64"):
        chosen_payload("base64", file)


def test_stream_waits_for_the_registry_and_quarantines_wrong_frames(service: Settings) -> None:
    troubles: list[str] = []

    def answer(number: int) -> Answer:
        if number != 42:
            return UNKNOWN
        return schema_answer(SCHEMA) if troubles else (503, b"")

    digit = next(iter(digit_images(1, 300)))[2]
    record = encoded(SHOT | {"image": digit})
    values = [HEADER + record, HEADER + record[:-1], b"\0\0\0\0\x07" + record, digit]
    with closing(KafkaProducer(bootstrap_servers=service.bootstrap_servers)) as producer:
        for value in values:
            producer.send(service.topic, value, partition=0).get(300)
    with schema_server(answer) as registry:
        payload = chosen_payload("avro:image", registry=registry.url)
        drain(service, payload=payload, on_trouble=troubles.append)
    assert troubles == [f"the schema registry {registry.url} answered 503 for schema 42; waiting for it"]
    assert [row["offset"] for row in rows(service, 'SELECT "offset" FROM predictions')] == [0]
    bad = rows(service, 'SELECT "offset", reason, detail, value FROM quarantine ORDER BY 1')
    assert [(row["offset"], row["reason"], row["value"]) for row in bad] == [
        (offset, "wrong_frame", values[offset]) for offset in (1, 2, 3)
    ]
    assert "knows, got 7" in bad[1]["detail"]
