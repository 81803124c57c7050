"""The process of one query, see `streaming.query_process`: reads a request from stdin, writes an Arrow stream.

An error is one line on standard error, encoded if its type is one of the package, with exit code 1.
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

# In addition to the imports: DuckDB's own limit, and the same again for threads, lists of files and rows in flight.
MEMORY_BYTES = 2 * 1024**3


def main() -> None:
    """Process one request."""
    rows, errors = os.dup(1), os.dup(2)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)  # so that no output of a library is mixed with the rows
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
                # An empty batch first, since Arrow writes the schema with the first batch.
                stream.write_batch(pa.RecordBatch.from_pylist([], found.schema))
                out.flush()
                for batch in found:
                    stream.write_batch(batch)
                    out.flush()
    except BrokenPipeError:
        pass  # the client has stopped reading
    except MemoryError:
        _fail(errors, TOO_MUCH_MEMORY)
    except ServiceError as error:
        _fail(errors, encode(error))
    except ModelError as error:
        _fail(errors, str(error))
    os._exit(0)  # without waiting for threads of DuckDB and deltalake


def _fail(errors: int, message: str) -> None:
    os.write(errors, READY + message.encode("utf-8", "replace"))
    os._exit(1)


def _limit_memory() -> None:
    """Limit private memory; reserved address space does not count."""
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/self/status").read_text("ascii").splitlines()
        taken = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData"))
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        resource.setrlimit(resource.RLIMIT_DATA, (taken + MEMORY_BYTES, hard))
