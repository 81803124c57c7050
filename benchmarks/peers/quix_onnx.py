"""Quix Streams with ONNX Runtime and a Delta sink; at least once, one process per core."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow as pa
from deltalake import DeltaTable, write_deltalake
from quixstreams import Application
from quixstreams.sinks import BatchingSink, SinkBatch
from scoring import Commits, Scoring, write_speed

ROWS_PER_COMMIT = 1_000
IDLE_S = 5.0
ROWS = pa.schema(
    {"partition": pa.int64(), "offset": pa.int64(), "label": pa.string(), "confidence": pa.float64(),
     "scored_at": pa.float64()}
)  # fmt: skip


class DeltaSink(BatchingSink):
    """Appends the rows scored since the last checkpoint, in one commit."""

    def __init__(self, table: str) -> None:
        super().__init__()
        self.table = table
        self.commits = Commits()

    def write(self, batch: SinkBatch) -> None:
        """Called for each topic partition at a checkpoint."""
        rows = [item.value for item in batch]
        write_deltalake(self.table, pa.Table.from_pylist(rows, schema=ROWS), mode="append")
        self.commits.add(len(rows))


def consume(options: argparse.Namespace) -> Commits:
    """Run the application until the topic is drained."""
    scoring = Scoring("onnxruntime", options.model, options.head)
    app = Application(
        broker_address=options.bootstrap,
        consumer_group=options.group,
        auto_offset_reset="earliest",
        commit_every=ROWS_PER_COMMIT,
        commit_interval=30.0,
        loglevel="WARNING",
    )
    sink = DeltaSink(options.table)
    frame = app.dataframe(app.topic(options.topic, value_deserializer="bytes", key_deserializer="bytes"))

    def score(value: bytes) -> dict[str, object]:
        return {name: column[0] for name, column in scoring.rows([value], [(0, 0)]).items()}

    frame.apply(score).sink(sink)
    app.run(timeout=IDLE_S)
    return sink.commits


def main() -> None:
    """Drain the topic and write the committed images per second."""
    parser = argparse.ArgumentParser()
    for name in ("bootstrap", "topic", "table"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("model", "head", "json"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--group")
    options = parser.parse_args()
    if options.group:  # a child process
        options.json.write_text(json.dumps(vars(consume(options))))
        return
    DeltaTable.create(options.table, ROWS)  # avoids a race between the processes
    with tempfile.TemporaryDirectory() as scratch:
        files = [Path(scratch, str(number)) for number in range(os.cpu_count() or 1)]
        given = sys.argv[1 : sys.argv.index("--json")]
        group = f"quix-{os.getpid()}"
        processes = [
            subprocess.Popen([sys.executable, __file__, *given, "--group", group, "--json", str(file)])
            for file in files
        ]
        if any(process.wait() for process in processes):
            sys.exit("a process failed")
        write_speed([Commits(**json.loads(file.read_text())) for file in files], options.json)


if __name__ == "__main__":
    main()
