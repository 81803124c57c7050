"""A stream that can be told to die: runs `run_stream`, and SIGKILLs its own process group at a named step.

    python -m tests.faults.driver SPEC

SPEC is JSON: `settings`, `options` of the stream, `log` (a file for one JSON line per event), and `kill` (null, or a
step of `streaming.pipeline.commit.STEPS` and the number of the micro-batch of this run, from 1).
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
    """Kills at a step of the n-th micro-batch that this run works on."""

    def __init__(self, kill: tuple[str, int] | None, note: Callable[..., None]) -> None:
        self._kill = kill
        self._note = note
        self._batches = 0

    def __call__(self, step: str) -> None:
        if step == STEPS[0]:
            self._batches += 1
        if self._kill is not None and (step, self._batches) == self._kill:
            self._note("kill", step=step, batch=self._batches)
            os.killpg(0, signal.SIGKILL)


def main() -> None:
    spec: dict[str, Any] = json.loads(sys.argv[1])
    settings = Settings(**spec["settings"])
    log = Path(spec["log"]).open("a", encoding="utf-8")  # noqa: SIM115  open for as long as the process lives

    def note(event: str, **what: Any) -> None:
        log.write(json.dumps({"at": time.time(), "event": event, **what}) + "\n")
        log.flush()

    def on_batch(batch: BatchResult) -> None:
        note("batch", id=batch.batch_id, version=batch.model_version, rows=batch.input_rows, seconds=batch.wall_s)

    events = StreamEvents(
        on_start=lambda: note("start"),
        on_batch=on_batch,
        on_step=Killer(tuple(spec["kill"]) if spec["kill"] else None, note),
        on_refused=lambda version, why: note("refused", version=version, why=why),
        on_trouble=lambda what: note("trouble", what=what),
    )
    try:
        summary = run_stream(settings, settings.bootstrap_servers or "", StreamOptions(**spec["options"]), events)
    except (ServiceError, ModelError) as error:
        note("error", what=str(error))
        sys.exit(1)
    note("end", batches=summary.batches, rows=summary.input_rows, restarts=summary.restarts)


if __name__ == "__main__":
    main()
