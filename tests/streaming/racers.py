"""Processes that do one thing at the same moment."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]


def run_at_once(code: str, arguments: Sequence[tuple[str | Path | int, ...]]) -> list[str]:
    """Run `code` in one process for each tuple of arguments; returns what each printed after the start.

    Args:
        code: prints `ready`, and waits for a line on its standard input before it begins.
    """
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", code, *map(str, of_one)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=CHECKOUT,
        )
        for of_one in arguments
    ]
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("\n")
        racer.stdin.flush()
    said = [racer.communicate()[0] for racer in racers]
    assert [racer.returncode for racer in racers] == [0] * len(racers)
    return said
