"""Processing of untrusted model files in a subprocess with limits on memory and time.

The subprocess runs a module that reads a JSON request from standard input and writes a JSON answer to standard output.
If it fails, the last line on standard error is the reason.
"""

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from models.errors import ModelError

MIB = 1024**2
MEMORY, CPU_S = 640 * MIB, 9  # raised by the work itself once it has checked its input
_REASON_CHARACTERS = 500
_LIMITED = {signal.SIGXCPU: "exceeded its limit of CPU time", signal.SIGKILL: "was killed: it used too much memory"}


def run_sandboxed(module: str, request: Mapping[str, Any], timeout_s: float) -> Any:
    """Run `python -m module` on a request and return its answer.

    Args:
        module: the module, whose `main` is `serve_sandboxed`.
        request: JSON values.
        timeout_s: wall-clock limit in seconds, for a process that blocks.

    Raises:
        ModelError: the module rejected the request, exceeded a limit, or crashed.
    """
    root = Path(__file__).parents[1]  # the folder of the package `models`, installed or not
    try:
        done = subprocess.run(
            [sys.executable, "-m", module], cwd=root, input=json.dumps(request), capture_output=True, text=True,
            timeout=timeout_s, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise ModelError(f"loading took more than {timeout_s:.0f} s") from None
    if done.returncode < 0:
        number = signal.Signals(-done.returncode)
        raise ModelError(f"the loading process {_LIMITED.get(number, f'crashed with {number.name}')}")
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"the loading process exited with code {done.returncode}"]
        raise ModelError(lines[-1][:_REASON_CHARACTERS])
    return json.loads(done.stdout)


def serve_sandboxed(work: Callable[[Any], Any]) -> None:
    """The `main` of a module run by `run_sandboxed`: limit this process, do the work, write the answer."""
    limit(MEMORY, CPU_S)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # this process' own environment
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries may print
    try:
        answer = work(json.load(sys.stdin))
    except MemoryError:
        allowed = resource.getrlimit(resource.RLIMIT_DATA)[0] // MIB
        sys.exit(f"it needs more memory than the limit of {allowed:,} MiB")
    except (ModelError, OSError) as error:
        sys.exit(" ".join(str(error).split()))
    json.dump(answer, answers)
    answers.flush()


def limit(memory: int, cpu_s: int) -> None:
    """Limit this process to `memory` bytes beyond what its libraries use (on Linux) and `cpu_s` seconds of CPU time."""
    for kind, most in ((resource.RLIMIT_DATA, memory + _taken_by_libraries()), (resource.RLIMIT_CPU, cpu_s)):
        resource.setrlimit(kind, (most, resource.getrlimit(kind)[1]))


@cache
def _taken_by_libraries() -> int:
    """Bytes of data mapped when the process is first limited: the stacks of one thread per core."""
    try:
        return int(Path("/proc/self/statm").read_text("ascii").split()[5]) * resource.getpagesize()
    except (OSError, IndexError, ValueError):
        return 0
