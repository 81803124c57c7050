"""The rows that a worker writes for messages of arbitrary producers."""

import base64
import hashlib
import json
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from models.bundle import Bundle, read_bundle
from streaming.errors import ServiceError
from streaming.images.dataset import digit_images
from streaming.pipeline.decisions import ModelVersion
from streaming.pipeline.messages import MAX_HEADERS
from streaming.pipeline.payload import chosen_payload, frame_of
from streaming.pipeline.reconcile import OffsetRun
from streaming.pipeline.score import MAX_TRACED, OUTPUT, REPORT, PartitionReport, ScoreTask, score_partition
from streaming.pipeline.score_columns import MAX_KEY_BYTES
from streaming.platform.engines import EngineChoice
from tests.streaming.small_models import bundle_folder

DIGIT = next(iter(digit_images(1)))[2]
DIGIT_SHA256 = hashlib.sha256(DIGIT).hexdigest()
NOON = datetime(2024, 5, 6, 12, tzinfo=UTC)
HEADER = pa.struct([pa.field("key", pa.string()), pa.field("value", pa.binary())])
INPUT = pa.schema(
    {
        "key": pa.binary(), "value": pa.binary(), "topic": pa.string(), "partition": pa.int32(), "offset": pa.int64(),
        "timestamp": pa.timestamp("us", tz="UTC"), "headers": pa.list_(HEADER),
    }
)  # fmt: skip


@dataclass(frozen=True)
class Scored:
    """The rows and the report of scored messages."""

    predictions: list[dict[str, Any]]
    quarantine: list[dict[str, Any]]
    features: list[dict[str, Any]]
    report: PartitionReport


@pytest.fixture(scope="module")
def bundle(trained: Path) -> Bundle:
    return read_bundle(bundle_folder(trained, 1))


@pytest.fixture
def score(bundle: Bundle, tmp_path: Path) -> Any:
    """A function that scores messages; each contains a digit unless it has another value."""
    folders = {name: tmp_path / name for name in ("quarantine", "features")}
    for folder in folders.values():
        folder.mkdir()
    names = {"images": "images~2"}
    champion, engine = ModelVersion(1, bundle.sha256), EngineChoice("litert")
    task = ScoreTask(champion, None, engine, None, "q", 7, names, *map(str, folders.values()))

    def rows_of(name: str) -> list[dict[str, Any]]:
        return [row for file in folders[name].iterdir() for row in pq.read_table(file).to_pylist()]

    def run(*messages: dict[str, Any], payload: str = "raw") -> Scored:
        defaults = {"topic": "images", "partition": 0, "value": DIGIT, "timestamp": int(NOON.timestamp() * 1e6)}
        completed = [defaults | {"offset": offset} | message for offset, message in enumerate(messages)]
        columns = [pa.array([row.get(field.name) for row in completed], field.type) for field in INPUT]
        batch = pa.RecordBatch.from_arrays(columns, schema=INPUT)
        out = pa.Table.from_batches(
            score_partition(
                iter([batch]), lambda: bundle, lambda: None, replace(task, payload=chosen_payload(payload))
            ),
            OUTPUT,
        )
        rows = out.to_pylist()
        (report,) = [PartitionReport.from_json(row["report"]) for row in rows if row[REPORT.name]]
        return Scored([row for row in rows if not row[REPORT.name]], rows_of("quarantine"), rows_of("features"), report)

    return run


@pytest.mark.parametrize(
    ("headers", "image_id"),
    [
        ([("ce_id", b"camera 7, frame 12")], "camera 7, frame 12"),
        ([("ce_id", b"first"), ("ce_id", b"last")], "last"),
        ([("ce_id", None)], DIGIT_SHA256),
        ([("ce_id", b"")], DIGIT_SHA256),
        ([("ce_id", b"a" * 300)], DIGIT_SHA256),  # truncated, it could equal another id
        ([("ce_id", b"frame \xff")], DIGIT_SHA256),  # not UTF-8: decoded with replacement, it could equal another id
        ([], DIGIT_SHA256),
        (None, DIGIT_SHA256),
    ],
)
def test_image_id_is_the_event_id_or_the_content_hash(
    score: Any, headers: list[tuple[str, bytes | None]] | None, image_id: str
) -> None:
    given = None if headers is None else [{"key": key, "value": value} for key, value in headers]
    scored = score({"key": b"camera 7", "headers": given}, {"key": b"camera 7", "headers": given, "value": b"text"})
    (prediction,), (bad,), (features,) = scored.predictions, scored.quarantine, scored.features
    assert (prediction["image_id"], features["image_id"]) == (image_id, image_id)
    assert features["content_sha256"] == DIGIT_SHA256
    assert bad["image_id"] == (image_id if image_id != DIGIT_SHA256 else hashlib.sha256(b"text").hexdigest())
    assert bad["headers"] == given
    assert {row["key"] for row in (prediction, features, bad)} == {b"camera 7"}
    assert {row["topic"] for row in (prediction, features, bad)} == {"images~2"}


def test_trace_contexts_are_reported_up_to_a_limit(score: Any) -> None:
    valid = b"00-%s-%s-01" % (b"a" * 32, b"b" * 16)
    traced, invalid = ({"headers": [{"key": "traceparent", "value": one}]} for one in (valid, b"00-x"))
    report = score(traced, invalid, {}, traced | {"value": b"text"}).report
    assert report.traced == [valid.decode()] * 2
    assert len(score(*[traced | {"value": b"text"}] * (MAX_TRACED + 1)).report.traced) == MAX_TRACED


@pytest.mark.parametrize("key", [None, b"", b"camera 7", b"\x00\xff\xfe", b"k" * (MAX_KEY_BYTES + 1)], ids=repr)
def test_key_is_truncated_except_in_the_quarantine(score: Any, key: bytes | None) -> None:
    scored = score({"key": key}, {"key": key, "value": b"text"})
    assert scored.predictions[0]["key"] == (key if key is None else key[:MAX_KEY_BYTES])
    assert scored.quarantine[0]["key"] == key


@pytest.mark.parametrize(
    ("microseconds", "published_at", "milliseconds"),
    [
        (1_714_996_800_123_000, NOON.replace(microsecond=123_000), 1_714_996_800_123),
        (31_536_000_000_000, datetime(1971, 1, 1, tzinfo=UTC), 31_536_000_000),
        (0, None, 0),
        (-1_000, None, -1),  # Kafka's value for no timestamp
        (1_714_996_800_000, None, 1_714_996_800),  # seconds, in 1970
        (1_714_996_800_123_456_000, None, 1_714_996_800_123_456),  # microseconds, in the year 56315
        (7_258_118_400_000_000, None, 7_258_118_400_000),  # 2200
        (None, None, None),
    ],
)
def test_invalid_timestamp_is_null_and_its_number_kept(
    score: Any, microseconds: int | None, published_at: datetime | None, milliseconds: int | None
) -> None:
    scored = score({"timestamp": microseconds}, {"timestamp": microseconds, "value": b"text"})
    for row in (scored.predictions[0], scored.quarantine[0], scored.features[0]):
        assert (row["published_at"], row["timestamp_ms"]) == (published_at, milliseconds)


@pytest.mark.parametrize(
    "headers",
    [[("a", b"")] * (MAX_HEADERS + 1), [("a", b"x" * 600_000)] * 2, [("a" * 1_100_000, None)]],
    ids=["many", "large values", "a large name"],
)
def test_message_with_too_many_headers_is_quarantined_without_them(
    score: Any, headers: list[tuple[str, bytes | None]]
) -> None:
    given = [{"key": key, "value": value} for key, value in headers]
    few = [{"key": "label", "value": b"7"}]
    scored = score({"headers": few}, {"headers": given}, {"headers": few, "value": b"text"}, {"headers": few})
    assert [(row["offset"], row["label_true"]) for row in scored.predictions] == [(0, "7"), (3, "7")]
    refused, text = sorted(scored.quarantine, key=lambda row: row["offset"])
    assert (refused["offset"], refused["stage"], refused["reason"]) == (1, "read", "too_many_headers")
    assert (refused["headers"], refused["image_id"], refused["value"]) == (None, DIGIT_SHA256, DIGIT)
    assert (text["reason"], text["headers"]) == ("not_an_image", few)
    assert scored.report.read == [OffsetRun("images~2", 0, 4, 0, 3)]
    assert scored.report.quarantined_at == [("images~2", 0, 2)]


# Frames


BASE64 = base64.b64encode(DIGIT)
FRAMES = {
    "base64": BASE64,
    "base64 in lines": base64.encodebytes(DIGIT),
    "base64 for URLs": base64.urlsafe_b64encode(DIGIT).rstrip(b"="),
    "data URL": b"data:image/png;base64," + BASE64,
    "json": json.dumps({"camera": 7, "image": BASE64.decode()}).encode(),
    "json in json": json.dumps({"frame": {"data": f"data:image/png;base64,{BASE64.decode()}"}}).encode(),
    "registry": b"\0\0\0\0\x2a" + b"\x06cam" + DIGIT,
    "multipart": b'--x\r\nContent-Disposition: form-data; name="file"\r\n\r\n' + DIGIT + b"\r\n--x--\r\n",
}


@pytest.mark.parametrize(
    ("frame", "detail"),
    [
        ("base64", "an image in base64: read it with --payload base64"),
        ("base64 in lines", "an image in base64: read it with --payload base64"),
        ("base64 for URLs", "an image in base64: read it with --payload base64"),
        ("data URL", "a data URL: read it with --payload base64"),
        ("json", "JSON with an image in base64: read it with --payload json:image"),
        ("json in json", "JSON with an image in base64: read it with --payload json:frame.data"),
        (
            "registry",
            "a record with an image, of schema 42 of a schema registry: read it with --payload avro:FIELD "
            "if it is Avro",
        ),
        ("multipart", "a multipart body: send its part as the message"),
    ],
)
def test_frame_around_an_image_is_named(score: Any, frame: str, detail: str) -> None:
    (bad,) = score({"value": FRAMES[frame]}).quarantine
    assert bad["reason"] == "not_an_image"
    assert bad["detail"].endswith(f"; it is {detail}")
    assert bad["value"] == FRAMES[frame]


@pytest.mark.parametrize(
    "value", [b"", b"this is text", b"SGVsbG8=" * 20, b"{", b'{"a": [1]}', b"\0" * 40, b"-- ", b"{" * 100_000]
)
def test_unframed_data_is_not_reported_to_contain_an_image(value: bytes) -> None:
    assert frame_of(value) in {None, "JSON without an image"}


@pytest.mark.parametrize(
    ("payload", "frame"),
    [
        ("base64", "base64"),
        ("base64", "base64 in lines"),
        ("base64", "base64 for URLs"),
        ("base64", "data URL"),
        ("json:image", "json"),
        ("json:frame.data", "json in json"),
    ],
)
def test_frame_is_removed_on_request(score: Any, payload: str, frame: str) -> None:
    wrong = [b"\xff\xd8 neither", b"{}", b'{"image": 7}']
    scored = score(*({"value": value} for value in (FRAMES[frame], *wrong, None)), payload=payload)
    (good,), (features,) = scored.predictions, scored.features
    assert (good["offset"], good["image_id"], features["content_sha256"]) == (0, DIGIT_SHA256, DIGIT_SHA256)
    bad = sorted(scored.quarantine, key=lambda row: row["offset"])
    assert [row["reason"] for row in bad] == ["wrong_frame"] * 3 + ["missing"]
    assert [row["value"] for row in bad] == [*wrong, None]
    assert bad[0]["value_sha256"] == hashlib.sha256(wrong[0]).hexdigest()


@pytest.mark.parametrize("payload", ["", "json", "json:", "avro:", "Base64", "protobuf:image"])
def test_invalid_payload_is_refused(payload: str) -> None:
    with pytest.raises(ServiceError, match="--payload: expected raw, base64, json:FIELD or avro:FIELD, got"):
        chosen_payload(payload)
