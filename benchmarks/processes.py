"""Processes that are measured: peers with an environment of their own, ended with all that they started."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

GRACE_S = 10  # for a process that is told to end
INSTALL_TIMEOUT_S = 1_200
PEERS = Path(__file__).with_name("peers")


def make_environment(directory: Path, requirements: Sequence[str]) -> Path:
    """The Python of an environment that has the packages and what they need, made if it is not there yet."""
    python, ready = directory / "bin" / "python", directory / ".ready"
    if not (ready.exists() and ready.read_text(encoding="utf-8").split() == list(requirements)):
        uv = Path(sys.executable).with_name("uv")
        make = (uv, "venv", "--quiet", "--clear", "--python", sys.executable, directory)
        install = (uv, "pip", "install", "--quiet", "--python", python, *requirements)
        for command in (make, install):
            subprocess.run(list(map(str, command)), check=True, timeout=INSTALL_TIMEOUT_S)
        ready.write_text("\n".join(requirements), encoding="utf-8")
    return python


def run_json(
    *command: object, environment: Mapping[str, str] | None = None, timeout_s: float = 1_800
) -> dict[str, Any]:
    """Run a command that takes `--json FILE`; what it wrote there.

    Raises:
        RuntimeError: it fails.
        TimeoutError: it did not end in time, and nothing of it goes on.
    """
    with TemporaryDirectory() as scratch:
        summary, log = Path(scratch, "summary.json"), Path(scratch, "log")
        with log.open("w") as said:
            process = subprocess.Popen(
                [str(word) for word in (*command, "--json", summary)], env=os.environ | dict(environment or {}),
                stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True,
            )  # fmt: skip
            try:
                code = process.wait(timeout_s)
            except subprocess.TimeoutExpired as error:
                raise TimeoutError(f"{command} did not end in {timeout_s:g} s") from error
            finally:
                end(process)
        if code != 0:
            raise RuntimeError(f"{command} ended with {code}: {log.read_text(errors='replace')[-2_000:]}")
        figures: dict[str, Any] = json.loads(summary.read_bytes())
        return figures


def end(process: "subprocess.Popen[bytes]") -> None:
    """End the process and all that it started, first kindly."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(GRACE_S)
        except ProcessLookupError:  # nobody is left
            return
        except subprocess.TimeoutExpired:
            continue
