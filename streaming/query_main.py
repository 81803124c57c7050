"""The process of one query (`streaming.query_process`): a request on standard input, rows as an Arrow stream out.

An error is one line on standard error, encoded where it has a type of ours, and exit code 1.
"""

import json
import os
import resource
import sys
from contextlib import suppress
from datetime import datetime
from pathlib import Path

import pyarrow as pa

from models.errors import ModelError
from streaming.errors import ServiceError, encode
from streaming.query import open_snapshot
from streaming.query_process import READY, TOO_MUCH_MEMORY
from streaming.settings import Settings

# Besides what imports took: DuckDB's own limit, and as much again for threads, lists of files and rows on their way.
MEMORY_BYTES = 2 * 1024**3


def main() -> None:
    """Answer one request."""
    rows, errors = os.dup(1), os.dup(2)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)  # nothing that a library says may get between the rows
    os.dup2(silence, 2)
    os.write(errors, READY)
    request = json.loads(sys.stdin.buffer.read())
    at = None if request["at"] is None else datetime.fromisoformat(request["at"])
    _limit_memory()
    try:
        with open_snapshot(Settings(**request["settings"]), at=at) as snapshot:
            os.write(errors, READY)
            with (
                snapshot.query(request["sql"], timeout_s=request["timeout_s"]) as found,
                os.fdopen(rows, "wb") as out,
                pa.ipc.new_stream(out, found.schema) as stream,
            ):
                # The columns, before the first row: Arrow writes them with the first batch.
                stream.write_batch(pa.RecordBatch.from_pylist([], found.schema))
                out.flush()
                for batch in found:
                    stream.write_batch(batch)
                    out.flush()
    except BrokenPipeError:
        pass  # whoever asked has read enough
    except MemoryError:
        _fail(errors, TOO_MUCH_MEMORY)
    except ServiceError as error:
        _fail(errors, encode(error))
    except ModelError as error:
        _fail(errors, str(error))
    os._exit(0)  # threads of DuckDB and deltalake need not be waited for


def _fail(errors: int, message: str) -> None:
    os.write(errors, READY + message.encode("utf-8", "replace"))
    os._exit(1)


def _limit_memory() -> None:
    """Bound what is written to: private memory, which reservations of address space are not."""
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/self/status").read_text("ascii").splitlines()
        taken = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData"))
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        resource.setrlimit(resource.RLIMIT_DATA, (taken + MEMORY_BYTES, hard))
