"""How fast is the dashboard with a million predictions? Times of the first view and of filters in a real browser.

    python -m benchmarks.dashboard [ROWS]

Writes predictions as a stream does, starts a server and Chromium, and measures the first view after the start, each
page, and each filter of the page Predictions until it is rendered. The data is removed at the end. ROWS should be a
multiple of 250, the number of commits.
"""

import hashlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from streaming.storage.tables import BATCHES, PREDICTIONS, Table
from tests.streaming.browser import chromium
from tests.streaming.dashboard.visitor import Visitor, wait_for

ROWS = 1_000_000
FILES = 250
DAYS, BATCH_S = 10, 30
RIGHT, LABELLED = 0.85, 0.3  # shares
LABELS = [f"class {number:02}" for number in range(20)]
QUERY_ID = "00000000-0000-4000-8000-000000000001"
SHA256 = "ab" * 32


def write_history(tables_dir: Path, rows: int = ROWS, files: int = FILES) -> None:
    """Write `rows` predictions of the last DAYS days in at least `files` commits, and their batches."""
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
        "damaged": pa.repeat(pa.scalar(value=False), n),
        "traceparent": pa.nulls(n, pa.string()),
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
        "drift": [
            ("rows", float(rows)),
            ("psi_max", 0.02 + 0.002 * batch_id),
            ("psi_mean", 0.01),
            ("psi_expected", 0.01),
        ],
        "started_at": done - timedelta(seconds=2),
        "committed_at": done,
    }
    return pa.Table.from_pylist([row], schema=BATCHES)


@contextmanager
def _served(home: Path) -> Iterator[str]:
    command = [sys.executable, "-m", "streaming", "--home", str(home), "dashboard", "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield re.findall(r"http://\S+", process.stdout.readline() if process.stdout else "")[0]
    finally:
        process.terminate()
        process.wait(20)


def _timed(visitor: Visitor, path: str, text: str, plots: int = 0) -> float:
    """Seconds from requesting a page until it shows `text` and its plots."""
    start = time.perf_counter()
    visitor.chrome.get(f"{visitor.address}/{path}")
    _await(visitor, text, plots)
    return time.perf_counter() - start


def _await(visitor: Visitor, text: str, plots: int = 0) -> None:
    visitor.waits_for_text(text)
    while len(visitor.all("[data-testid=stVegaLiteChart] canvas, [data-testid=stVegaLiteChart] svg")) < plots:
        time.sleep(0.02)


def _filters(visitor: Visitor, rows: int) -> Iterator[tuple[str, float]]:
    """Seconds of each filter of the page Predictions, from the input until the number of matches changes."""
    for name, css, keys in (
        ("source", "input[aria-label*='Source']", "0123\n"),
        ("label", "input[aria-label*='Label']", "class 03\n"),
        ("version", "input[aria-label*='Model version']", "2\n"),
    ):
        _timed(visitor, "predictions", f"{rows:,} predictions")
        box = wait_for(partial(visitor.all, css))[-1]
        box.click()
        box.send_keys(keys[:-1])
        time.sleep(0.5)
        start = time.perf_counter()
        box.send_keys(keys[-1])
        visitor.waits_for_text(rf"of [\d,]+ · (?!{rows:,})[\d,]+ predictions")
        yield f"filter by {name}", time.perf_counter() - start
    _timed(visitor, "predictions", f"{rows:,} predictions")
    start = time.perf_counter()
    visitor.click("wrong")
    visitor.waits_for_text(rf"of [\d,]+ · (?!{rows:,})[\d,]+ predictions")
    yield "only wrong ones", time.perf_counter() - start


def main(rows: int = ROWS) -> None:
    """Run the benchmark and print the seconds."""
    with tempfile.TemporaryDirectory() as directory:
        home = Path(directory)
        write_history(home / "tables", rows)
        files = len(list(home.rglob("predictions/**/*.parquet")))
        print(f"{rows:,} predictions in {files} files, {os.cpu_count()} cores")
        with _served(home) as address, chromium(width=1400) as chrome:
            visitor = Visitor(chrome, address)
            figures = [("first view (Live, plots drawn)", _timed(visitor, "", "Latency, p95", plots=2))]
            figures += [
                (f"page {name}", _timed(visitor, path, text, plots))
                for name, path, text, plots in (
                    ("Live", "", "Latency, p95", 2),
                    ("Predictions", "predictions", f"{rows:,} predictions", 0),
                    ("Drift", "drift", "PSI, mean", 3),
                )
            ]
            figures += _filters(visitor, rows)
        for name, seconds in figures:
            print(f"{name:32} {seconds:.2f} s")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
