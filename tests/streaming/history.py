"""Histories of a stream in real Delta tables, written as by the stream but without Spark and Kafka."""

import hashlib
import json
import uuid
from collections.abc import Collection, Mapping
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa

from streaming.pipeline.decisions import CountedRange, Decision, Figures, ModelVersion, OffsetRange
from streaming.pipeline.positions import FirstOffset, StreamIdentity, identity_key
from streaming.settings import Settings
from streaming.storage import table_log
from streaming.storage.files import DataFile, FileSink
from streaming.storage.store import open_store
from streaming.storage.tables import BATCHES, PREDICTIONS, QUARANTINE, Table

QUERY_ID = "00000000-0000-4000-8000-000000000001"
SHA256 = "ab" * 32
NOON = datetime(2024, 5, 6, 12, tzinfo=UTC)
Ranges = Mapping[int, tuple[int, int]]  # partition → (start, end)


def commit_batch(
    settings: Settings,
    batch_id: int,
    ranges: Ranges,
    *,
    bad: Collection[int] = (),
    holes: Collection[int] = (),
    upto: str = "batches",
    query_id: str = QUERY_ID,
    version: int = 1,
    left_out: Ranges | None = None,
    drift: Mapping[str, float] | None = None,
) -> None:
    """Commit one micro-batch: a row for every offset except `holes`, quarantined for those in `bad`.

    Args:
        upto: the last table to write.
    """
    offsets = {partition: [one for one in range(*ends) if one not in holes] for partition, ends in ranges.items()}
    identities = [(partition, offset) for partition, found in offsets.items() for offset in found]
    good = [identity for identity in identities if identity[1] not in bad]
    lineage = {"model_version": version, "bundle_sha256": SHA256, "query_id": query_id, "batch_id": batch_id}
    rows = [prediction(settings, partition, offset) | lineage for partition, offset in good]
    predictions = Table(settings.place.tables, "predictions")
    predictions.append(pa.Table.from_pylist(rows, schema=PREDICTIONS), query_id, batch_id)
    quarantine = Table(settings.place.tables, "quarantine")
    if upto == "predictions":
        return
    rejected = [quarantined(settings, partition, offset) | lineage for partition, offset in identities if offset in bad]
    quarantine.append_files(worker_file(quarantine.place, rejected), query_id, batch_id)
    if upto == "quarantine":
        return
    batch = lineage | {
        "offsets": [
            one | {"rows": len(offsets[one["partition"]]), "log_start": 0 if holes else None}
            for one in ranges_of(settings, ranges)
        ],
        "left_out": ranges_of(settings, left_out or {}),
        "input_rows": len(identities),
        "predicted_rows": len(good),
        "quarantined_rows": len(rejected),
        "input_bytes": 1000 * len(identities),
        "seconds": [("batch", 2.0)],
        "drift": list(drift.items()) if drift else None,
        "started_at": datetime.now(UTC) - timedelta(seconds=2),
        "committed_at": datetime.now(UTC),
    }
    Table(settings.place.tables, "batches").append(pa.Table.from_pylist([batch], schema=BATCHES), query_id, batch_id)


def ranges_of(settings: Settings, ranges: Ranges) -> list[dict[str, Any]]:
    """Offset ranges as rows of the tables."""
    return [
        {"topic": settings.topic, "partition": partition, "start": start, "end": end}
        for partition, (start, end) in ranges.items()
    ]


def prediction(settings: Settings, partition: int, offset: int) -> dict[str, Any]:
    return {
        "image_id": f"{partition}-{offset}",
        "topic": settings.topic,
        "partition": partition,
        "offset": offset,
        "label": "cat",
        "confidence": 0.75,
        "scored_at": NOON,
        "date": date(2024, 5, 6),
    }


def quarantined(settings: Settings, partition: int, offset: int, value: bytes | None = None) -> dict[str, Any]:
    value = f"bad {partition}-{offset}".encode() if value is None else value
    return {
        "image_id": hashlib.sha256(value).hexdigest(),
        "topic": settings.topic,
        "partition": partition,
        "offset": offset,
        "source": f"photos/{partition}-{offset}.jpg",
        "label_true": "dog",
        "stage": "decode",
        "reason": "truncated" if offset % 2 else "not_an_image",
        "value": value,
    }


def worker_file(directory: Path, rows: list[dict[str, Any]]) -> list[DataFile]:
    """Write a file as a worker does, not yet part of the table; an empty list without rows."""
    with FileSink(str(directory), QUARANTINE) as sink:
        sink.write(pa.Table.from_pylist(rows, schema=QUARANTINE))
        file = sink.close()
    return [] if file is None else [file]


def begin_stream(settings: Settings, first: Mapping[int, int] | None = None, stream_id: str = QUERY_ID) -> None:
    """Create the identity of the topic's stream, as its first start does."""
    places = tuple(FirstOffset(settings.topic, one, offset) for one, offset in (first or {}).items())
    identity = StreamIdentity(stream_id, settings.topic, {settings.topic: "topic-id"}, places)
    assert open_store(settings.home).create(identity_key(settings.topic), identity.to_json())


def decision_of(
    settings: Settings,
    number: int,
    ranges: Ranges,
    *,
    bad: Collection[int] = (),
    stream_id: str = QUERY_ID,
    version: int = 1,
    left_out: Ranges | None = None,
) -> Decision:
    """A decided batch whose files are written but not committed; rows as in `commit_batch`."""
    identities = [(partition, offset) for partition, (start, end) in ranges.items() for offset in range(start, end)]
    good, rejected = ([one for one in identities if (one[1] in bad) is is_bad] for is_bad in (False, True))
    lineage = {"model_version": version, "bundle_sha256": SHA256, "query_id": stream_id, "batch_id": number}
    rows = {
        "predictions": pa.Table.from_pylist([prediction(settings, *one) | lineage for one in good], schema=PREDICTIONS),
        "quarantine": pa.Table.from_pylist(
            [quarantined(settings, *one) | lineage for one in rejected], schema=QUARANTINE
        ),
    }
    return Decision(
        number=number,
        stream=stream_id,
        ranges=tuple(CountedRange(**one, rows=one["end"] - one["start"]) for one in ranges_of(settings, ranges)),
        model=ModelVersion(version, SHA256),
        challenger=None,
        topics={settings.topic: "topic-id"},
        left_out=tuple(OffsetRange(**one) for one in ranges_of(settings, left_out or {})),
        figures=Figures(
            input_bytes=1000 * len(identities),
            predicted_rows=len(good),
            quarantined={"corrupt": len(rejected)} if rejected else {},
            seconds={"batch": 2.0},
            refused=None,
            drift={},
            started_at=NOON,
        ),
        files={name: tuple(Table(settings.place.tables, name).write(table)) for name, table in rows.items()},
        decided_at=NOON,
        nonce=uuid.uuid4().hex,
    )


def new_topic() -> str:
    return f"images-{uuid.uuid4().hex[:8]}"


def wait_for_checkpoint() -> None:
    """Wait until all checkpoints, which one thread writes in order, are complete."""
    table_log._CHECKPOINTS.submit(int).result()


def enable_deletion_vectors(place: str) -> None:
    """Add a version in which another program has enabled deletion vectors; no file has one yet."""
    log = sorted((Path(place) / "_delta_log").glob("*.json"))
    actions = map(json.loads, log[0].read_text().splitlines())
    (metadata,) = [action["metaData"] for action in actions if "metaData" in action]
    metadata["configuration"]["delta.enableDeletionVectors"] = "true"
    features = {"readerFeatures": ["deletionVectors"], "writerFeatures": ["deletionVectors"]}
    upgrade = [{"protocol": {"minReaderVersion": 3, "minWriterVersion": 7, **features}}, {"metaData": metadata}]
    log[0].with_stem(f"{len(log):020}").write_text("\n".join(map(json.dumps, upgrade)))
