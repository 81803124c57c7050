"""Processes that are killed on the way, between two changes that others can see."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from itertools import count
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest


def killed_at_each_step(action: Callable[[Path], object], homes: Callable[[], Path]) -> Iterator[Path]:
    """Run `action` in one process for each of its links and renames, and kill it with SIGKILL before that one.

    Args:
        action: importable, as for `processes_with_module_of`.
        homes: gives a home for each process.

    Yields:
        The home that each killed process left. The process after the last of them ends by itself.
    """
    context = processes_with_module_of(action)
    for step in count():
        home = homes()
        process = context.Process(target=_run, args=(action, home, step))
        process.start()
        process.join(300)
        if process.exitcode == 0:
            return
        assert process.exitcode == -signal.SIGKILL, process.exitcode
        yield home


def processes_with_module_of(function: Callable[..., object]) -> ForkServerContext:
    """Processes that a small server forks, which has imported the module of a function, or of an earlier one.

    Each shares nothing else with the test process, and starts without the second that the imports take.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([function.__module__])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # the server knows no other way to the tests' modules
        forkserver.ensure_running()
    return context


def _run(action: Callable[[Path], object], home: Path, step: int) -> None:
    done = count()

    def counted(change: Callable[..., Any]) -> Callable[..., Any]:
        def changed(*arguments: Any, **options: Any) -> Any:
            if next(done) == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return change(*arguments, **options)

        return changed

    os.link, os.rename = counted(os.link), counted(os.rename)
    action(home)
