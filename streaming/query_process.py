"""Runs a user's SQL in its own process, which can be killed, since DuckDB checks its limits only between rows.

`repeat('x', 3_000_000_000)` is one expression of one row, and neither DuckDB's interrupt nor its memory limit stops it.
The kernel does: the memory of the process is limited, and it is killed when its timeout expires.
"""

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import IO

import pyarrow as pa

from streaming.errors import DataError, ServiceError, decode
from streaming.settings import Settings

# With the module search path of this process.
PROGRAM = "import sys; sys.path[:] = {path!r}; from streaming.query_main import main; main()"
TIMEOUT_S = 60.0
READY = b"\n"  # on standard error: after the imports, and when the tables are open or before an error
START_TIMEOUT_S = 60.0
GRACE_S = 2.0  # after the timeout, for the query to end by itself
TOO_MUCH_MEMORY = "SQL: the query exceeded its memory limit: narrow it"
MAX_ERROR_BYTES = 64 * 1024


@contextmanager
def open_guarded_query(
    settings: Settings, sql: str, *, timeout_s: float = TIMEOUT_S, at: datetime | None = None
) -> Iterator[pa.RecordBatchReader]:
    """As `streaming.query.open_query`, but the limits also apply within a single expression.

    Raises:
        ServiceError: see there; also raised while rows are read.
    """
    request = {
        "settings": settings.model_dump(mode="json"),
        "sql": sql,
        "timeout_s": timeout_s,
        "at": None if at is None else at.isoformat(),
    }
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", PROGRAM.format(path=sys.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    late = threading.Event()

    def end() -> None:
        late.set()
        process.kill()

    timer = _started(START_TIMEOUT_S, end)
    try:
        with _errors_of(process, late, timeout_s):
            _wait_ready(process)
            _pipe(process.stdin).write(json.dumps(request).encode())
            _pipe(process.stdin).close()
            _wait_ready(process)
            timer.cancel()
            timer = _started(timeout_s + GRACE_S, end)  # without the time for the start and for opening tables
            reader = pa.ipc.open_stream(_pipe(process.stdout))
        yield pa.RecordBatchReader.from_batches(reader.schema, _rows(reader, process, late, timeout_s))
    finally:
        timer.cancel()
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            _pipe(pipe).close()


def _wait_ready(process: "subprocess.Popen[bytes]") -> None:
    if _pipe(process.stderr).read(1) != READY:
        raise pa.ArrowInvalid("the process of the query ended early")


def _started(seconds: float, end: Callable[[], None]) -> threading.Timer:
    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    return timer


def _rows(
    reader: pa.RecordBatchReader, process: "subprocess.Popen[bytes]", late: threading.Event, timeout_s: float
) -> Iterator[pa.RecordBatch]:
    with _errors_of(process, late, timeout_s):
        yield from (batch for batch in reader if batch.num_rows)
        if process.wait() != 0:
            raise pa.ArrowInvalid("the rows end early")


@contextmanager
def _errors_of(process: "subprocess.Popen[bytes]", late: threading.Event, timeout_s: float) -> Iterator[None]:
    """Convert failures of the process to one-line errors."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        status = process.wait()
        output = _pipe(process.stderr).read(MAX_ERROR_BYTES).decode("utf-8", "replace").strip()
        if late.is_set():
            message = f"SQL: the query took longer than {timeout_s:g} s: narrow it, or allow more with --timeout"
        elif status < 0:  # C++ code aborts the process if the kernel denies memory
            message = TOO_MUCH_MEMORY
        elif found := decode(output):
            raise found from error
        else:
            message = output or f"SQL: the process of the query ended with exit code {status}"
        raise DataError(message) from error


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    if pipe is None:
        raise ServiceError("the process of the query has no pipe")
    return pipe
