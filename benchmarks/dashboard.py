"""The dashboard over a million predictions: seconds to its first view, and of a filter, in a real browser.

python -m benchmarks.dashboard [ROWS]
"""

import hashlib
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa

from streaming.tables import BATCHES, PREDICTIONS, Table

ROWS = 1_000_000
FILES = 240
DAYS, BATCH_S = 10, 30
RIGHT, LABELLED = 0.85, 0.3  # shares
LABELS = [f"class {number:02}" for number in range(20)]
QUERY_ID = "00000000-0000-4000-8000-000000000001"
SHA256 = "ab" * 32


def write_history(tables_dir: Path, rows: int = ROWS, files: int = FILES) -> None:
    """`rows` predictions of the last DAYS days in at least `files` commits, and the batches that they were made in."""
    predictions, batches = Table(tables_dir, "predictions"), Table(tables_dir, "batches")
    chance = np.random.default_rng(7)
    per_file = rows // files
    end = datetime.now(UTC)
    start = end - timedelta(days=DAYS)
    for number in range(files):
        first = number * per_file
        made = np.datetime64((start + (number + 1) * (end - start) / files).replace(tzinfo=None), "us")
        at = made - np.sort(chance.integers(0, BATCH_S * 1_000_000, per_file))[::-1].astype("timedelta64[us]")
        version = 1 + 3 * number // files
        predictions.append(_predictions(chance, at, first, version, number), QUERY_ID, number)
        batches.append(_batch(at[-1], first, per_file, version, number), QUERY_ID, number)


def _predictions(chance: np.random.Generator, at: np.ndarray, first: int, version: int, batch_id: int) -> pa.Table:
    n = len(at)
    answer, truth = chance.integers(len(LABELS), size=(2, n))
    truth = np.where(chance.random(n) < RIGHT, answer, truth)
    confidence = np.clip(chance.beta(6, 2, n), 0.05, 1).astype(np.float32)
    names = np.array(LABELS)
    top = pa.StructArray.from_arrays([pa.array(names[answer]), pa.array(confidence)], ["label", "probability"])
    scored_at = pa.array(at, pa.timestamp("us")).cast(pa.timestamp("us", tz="UTC"))
    waited = (chance.gamma(3, 0.25, n) * 1e6).astype("timedelta64[us]")
    columns = {
        "image_id": [hashlib.sha256(str(first + i).encode()).hexdigest() for i in range(n)],
        "topic": pa.repeat("images", n),
        "partition": (np.arange(n) % 4).astype(np.int32),
        "offset": first // 4 + np.arange(n) // 4,
        "published_at": pa.array(at - waited, pa.timestamp("us")).cast(scored_at.type),
        "source": [f"photos/{first + i:07}.jpg" for i in range(n)],
        "label_true": pa.array(names[truth], mask=chance.random(n) > LABELLED),
        "label": names[answer],
        "confidence": confidence,
        "top_k": pa.ListArray.from_arrays(np.arange(n + 1, dtype=np.int32), top),
        "scored_at": scored_at,
        "model_version": pa.repeat(version, n),
        "bundle_sha256": pa.repeat(SHA256, n),
        "query_id": pa.repeat(QUERY_ID, n),
        "batch_id": pa.repeat(batch_id, n),
        "date": at.astype("datetime64[D]"),
    }
    return pa.table(columns).select(PREDICTIONS.names).cast(PREDICTIONS)


def _batch(at: np.datetime64, first: int, rows: int, version: int, batch_id: int) -> pa.Table:
    done = at.astype(datetime).replace(tzinfo=UTC)
    row = {
        "model_version": version,
        "bundle_sha256": SHA256,
        "query_id": QUERY_ID,
        "batch_id": batch_id,
        "offsets": [{"topic": "images", "partition": 0, "start": first, "end": first + rows}],
        "input_rows": rows,
        "predicted_rows": rows,
        "quarantined_rows": 0,
        "input_bytes": 40_000 * rows,
        "seconds": [("batch", rows / 150), ("score", rows / 160)],
        "drift": [("rows", float(rows)), ("psi_max", 0.02 + 0.002 * batch_id), ("psi_mean", 0.01)],
        "started_at": done - timedelta(seconds=2),
        "committed_at": done,
    }
    return pa.Table.from_pylist([row], schema=BATCHES)
