"""Periodic runs of a batch job, each in a new process.

No memory is held between runs, and a run that fails, or a JVM that dies, does not affect later runs.
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
    """Parse an interval such as `90s`, `30m`, `24h` or `7d`; the unit is required.

    Raises:
        UsageError: the text is invalid, or not between a second and a year.
    """
    return timedelta(seconds=parse_duration(text, plain=None, min_s=1.0))


def run_every(interval: timedelta, command: Sequence[str], on_run: OnRun) -> None:
    """Run `command` immediately and then every `interval`, until SIGINT or SIGTERM, which interrupts the current run.

    A run that takes longer than the interval delays the next one; runs never overlap.

    Args:
        interval: time between the starts of two runs.
        on_run: called after each run with its exit code and its last line of output (of standard error if it failed).
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
    # A new session: Ctrl-C in a terminal reaches only this process, and the whole process group can be ended.
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True
    )
    watch = threading.Thread(target=_end_group, args=(process, stop), daemon=True)
    watch.start()
    output, errors = process.communicate()
    watch.join()
    lines = (output if process.returncode == 0 else errors or output).strip().splitlines()
    return process.returncode, lines[-1] if lines else "no output"


def _end_group(process: "subprocess.Popen[str]", stop: threading.Event) -> None:
    """Terminate the process on `stop`; after it has ended, kill the rest of its group, such as a JVM."""
    give_up: float | None = None
    while process.poll() is None and (give_up is None or monotonic() < give_up):
        if give_up is None and stop.is_set():
            process.terminate()
            give_up = monotonic() + STOP_TIMEOUT_S
        sleep(POLL_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
