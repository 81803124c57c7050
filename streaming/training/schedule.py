"""A batch job done again and again, each time in a process of its own.

Between two runs nothing is left that holds memory, and a run that fails, or a JVM that dies, does not end the others.
"""

import os
import signal
import subprocess
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from time import monotonic, sleep

from streaming.durations import parse_duration
from streaming.signals import stop_signals

STOP_TIMEOUT_S = 30.0
POLL_S = 0.2

OnRun = Callable[[int, str], None]


def parse_interval(text: str) -> timedelta:
    """The time in `90s`, `30m`, `24h` or `7d`; it has a unit.

    Raises:
        UsageError: it is none of these, or not between a second and a year.
    """
    return timedelta(seconds=parse_duration(text, plain=None, least_s=1.0))


def run_every(interval: timedelta, command: Sequence[str], on_run: OnRun) -> None:
    """Run `command` now and then every `interval`, until SIGINT or SIGTERM; the run under way is then interrupted.

    A run that takes longer than the interval delays the next one; no two run at a time.

    Args:
        on_run: called after each run with its exit code and the last line that it said, on standard error if it failed.
    """
    with stop_signals() as stop:
        while not stop.is_set():
            due = monotonic() + interval.total_seconds()
            code, said = _run(command, stop)
            if stop.is_set():
                return
            on_run(code, said)
            stop.wait(max(0.0, due - monotonic()))


def _run(command: Sequence[str], stop: threading.Event) -> tuple[int, str]:
    # A session of its own, so that Ctrl-C in a terminal comes to us alone, and all that it started ends with it.
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True
    )
    watch = threading.Thread(target=_end_group, args=(process, stop), daemon=True)
    watch.start()
    output, errors = process.communicate()
    watch.join()
    lines = (output if process.returncode == 0 else errors or output).strip().splitlines()
    return process.returncode, lines[-1] if lines else "it said nothing"


def _end_group(process: "subprocess.Popen[str]", stop: threading.Event) -> None:
    """Interrupt the process when told to stop; once it has ended, end what it left running, such as a JVM."""
    give_up: float | None = None
    while process.poll() is None and (give_up is None or monotonic() < give_up):
        if give_up is None and stop.is_set():
            process.terminate()
            give_up = monotonic() + STOP_TIMEOUT_S
        sleep(POLL_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
