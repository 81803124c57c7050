"""Concurrent processes that start at the same time."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]


def run_at_once(code: str, arguments: Sequence[tuple[str | Path | int, ...]]) -> list[str]:
    """Run `code` in one process for each tuple of arguments; return the output of each after the start.

    Args:
        code: prints `ready`, then waits for a line on standard input before it starts.
    """
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", code, *map(str, values)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=CHECKOUT,
        )
        for values in arguments
    ]
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("\n")
        racer.stdin.flush()
    outputs = [racer.communicate()[0] for racer in racers]
    assert [racer.returncode for racer in racers] == [0] * len(racers)
    return outputs
