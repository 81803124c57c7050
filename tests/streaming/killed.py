"""Processes that are killed on the way, between two changes that others can see."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any


def killed_at_each_step(action: Callable[[Path], object], homes: Callable[[], Path]) -> Iterator[Path]:
    """Run `action` in one process for each of its links and renames, and kill it with SIGKILL before that one.

    Args:
        action: importable, since each process is a new one.
        homes: gives a home for each process.

    Yields:
        The home that each killed process left. The process after the last of them ends by itself.
    """
    for step in count():
        home = homes()
        process = multiprocessing.get_context("spawn").Process(target=_run, args=(action, home, step))
        process.start()
        process.join(300)
        if process.exitcode == 0:
            return
        assert process.exitcode == -signal.SIGKILL, process.exitcode
        yield home


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
