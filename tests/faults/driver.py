"""Runs `run_stream` and sends SIGKILL to its own process group at a given step.

    python -m tests.faults.driver SPEC

SPEC is JSON: `settings`, `options` of the stream, `log` (the file for one JSON line per event) and `kill` (null, or a
step of `streaming.pipeline.commit.STEPS` and a number of a micro-batch of this run, from 1).
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from models.errors import ModelError
from streaming.errors import ServiceError
from streaming.pipeline.commit import STEPS, BatchResult
from streaming.pipeline.stream import StreamEvents, StreamOptions, run_stream
from streaming.settings import Settings


class Killer:
    """Kills the process group at a step of the n-th micro-batch of this run."""

    def __init__(self, kill: tuple[str, int] | None, log: Callable[..., None]) -> None:
        self._kill = kill
        self._log = log
        self._batches = 0

    def __call__(self, step: str) -> None:
        if step == STEPS[0]:
            self._batches += 1
        if self._kill is not None and (step, self._batches) == self._kill:
            self._log("kill", step=step, batch=self._batches)
            os.killpg(0, signal.SIGKILL)


def main() -> None:
    spec: dict[str, Any] = json.loads(sys.argv[1])
    settings = Settings(**spec["settings"])
    file = Path(spec["log"]).open("a", encoding="utf-8")  # noqa: SIM115  open until the process ends

    def log(event: str, **what: Any) -> None:
        file.write(json.dumps({"at": time.time(), "event": event, **what}) + "\n")
        file.flush()

    def on_batch(batch: BatchResult) -> None:
        log("batch", id=batch.batch_id, version=batch.model_version, rows=batch.input_rows, seconds=batch.wall_s)

    events = StreamEvents(
        on_start=lambda: log("start"),
        on_batch=on_batch,
        on_step=Killer(tuple(spec["kill"]) if spec["kill"] else None, log),
        on_refused=lambda version, why: log("refused", version=version, why=why),
        on_trouble=lambda what: log("trouble", what=what),
    )
    try:
        summary = run_stream(settings, settings.bootstrap_servers or "", StreamOptions(**spec["options"]), events)
    except (ServiceError, ModelError) as error:
        log("error", what=str(error))
        sys.exit(1)
    log("end", batches=summary.batches, rows=summary.input_rows, restarts=summary.restarts)


if __name__ == "__main__":
    main()
