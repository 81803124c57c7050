"""SQL of a user in a process of its own, which can be ended: DuckDB looks at its limits between rows, not within one.

`repeat('x', 3_000_000_000)` is one expression of one row, and neither DuckDB's interrupt nor its memory limit ends it.
The kernel does: the process may not have more memory, and is killed when its time is up.
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

from streaming.errors import DataError, ServiceError
from streaming.settings import Settings

# With the path of this process, from wherever it has its modules.
PROGRAM = "import sys; sys.path[:] = {path!r}; from streaming.query_main import main; main()"
TIMEOUT_S = 60.0
READY = b"\n"  # on standard error: when everything is imported, and when the tables are open or an error follows
START_TIMEOUT_S = 60.0
GRACE_S = 2.0  # after its time, for the query to end by itself
TOO_MUCH_MEMORY = "SQL: the query needs more memory than it may have: narrow it"
MAX_ERROR_BYTES = 64 * 1024


@contextmanager
def open_guarded_query(
    settings: Settings, sql: str, *, timeout_s: float = TIMEOUT_S, at: datetime | None = None
) -> Iterator[pa.RecordBatchReader]:
    """As `streaming.query.open_query`, whose limits hold here for a single expression, too.

    Raises:
        ServiceError: as there; also while the rows are read.
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
            timer = _started(timeout_s + GRACE_S, end)  # its start and the opening of tables are not the query's
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
    """Why there are no rows, or no more, in one line."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        status = process.wait()
        said = _pipe(process.stderr).read(MAX_ERROR_BYTES).decode("utf-8", "replace").strip()
        if late.is_set():
            message = f"SQL: the query took longer than {timeout_s:g} s: narrow it, or allow more with --timeout"
        elif status < 0:  # what the kernel refuses it, C++ answers by ending the process
            message = TOO_MUCH_MEMORY
        else:
            message = said or f"SQL: the process of the query ended with exit code {status}"
        raise DataError(message) from error


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    if pipe is None:
        raise ServiceError("the process of the query has no pipe")
    return pipe
