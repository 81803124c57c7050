"""Work on hostile files in a process of its own, with limits on memory and time, that can crash or be ended.

A module that is run so reads a request, JSON on standard input, and writes its answer, JSON, on standard output. The
last line on standard error says why it failed, if it did.
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
MEMORY, CPU_S = 640 * MIB, 9  # until the work has found out that it needs more, and may
_REASON_CHARACTERS = 500
_LIMITED = {signal.SIGXCPU: "took more CPU time than is allowed", signal.SIGKILL: "was ended: it took too much memory"}


def run_apart(module: str, request: Mapping[str, Any], timeout_s: float) -> Any:
    """Run `python -m module` on a request; returns its answer.

    Args:
        timeout_s: on the clock, for a process that waits for something.

    Raises:
        ModelError: it refuses the request, or came to one of its limits, or crashed.
    """
    root = Path(__file__).parents[1]  # where `models` is found, installed or not
    try:
        done = subprocess.run(
            [sys.executable, "-m", module], cwd=root, input=json.dumps(request), capture_output=True, text=True,
            timeout=timeout_s, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise ModelError(f"loading it took more than {timeout_s:.0f} s") from None
    if done.returncode < 0:
        number = signal.Signals(-done.returncode)
        raise ModelError(f"the process that loads it {_LIMITED.get(number, f'crashed with {number.name}')}")
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"the process that loads it ended with code {done.returncode}"]
        raise ModelError(said[-1][:_REASON_CHARACTERS])
    return json.loads(done.stdout)


def answer_apart(work: Callable[[Any], Any]) -> None:
    """The `main` of a module that `run_apart` runs: limit this process, do the work, answer."""
    limit(MEMORY, CPU_S)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # this process' own environment
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is not the answer
    try:
        answer = work(json.load(sys.stdin))
    except MemoryError:
        allowed = resource.getrlimit(resource.RLIMIT_DATA)[0] // MIB
        sys.exit(f"it takes more than the {allowed:,} MiB of memory allowed")
    except (ModelError, OSError) as error:
        sys.exit(" ".join(str(error).split()))
    json.dump(answer, answers)
    answers.flush()


def limit(memory: int, cpu_s: int) -> None:
    """Limit this process to `memory` bytes beyond what its libraries took (on Linux) and `cpu_s` of CPU time."""
    for kind, most in ((resource.RLIMIT_DATA, memory + _taken_by_libraries()), (resource.RLIMIT_CPU, cpu_s)):
        resource.setrlimit(kind, (most, resource.getrlimit(kind)[1]))


@cache
def _taken_by_libraries() -> int:
    """Bytes that this process has mapped for data when it is first limited: stacks of threads, one for each core."""
    try:
        return int(Path("/proc/self/statm").read_text("ascii").split()[5]) * resource.getpagesize()
    except (OSError, IndexError, ValueError):
        return 0
