"""Processes that are killed between two changes that are visible to others."""

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
    """Run `action` in one process for each of its links and renames, and kill the process before that call.

    Args:
        action: importable, as for `processes_with_module_of`.
        homes: returns a new home for each process.

    Yields:
        The home that each killed process left. The last process is not killed.
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
    """A context whose processes are forked by a server that has imported the module of a function.

    They share nothing else with the test process, and start without the second that the imports take.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([function.__module__])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # the server finds the tests' modules by it
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
