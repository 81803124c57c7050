"""Running measured processes: environments for peers, JSON results, and termination of process groups."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

GRACE_S = 10  # between SIGTERM and SIGKILL
INSTALL_TIMEOUT_S = 1_200
PEERS = Path(__file__).with_name("peers")


def make_environment(directory: Path, requirements: Sequence[str]) -> Path:
    """The Python of a virtual environment with the packages, created if it does not exist."""
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
    """Run a command that accepts `--json FILE`, and return the content of the file.

    Raises:
        RuntimeError: the command failed.
        TimeoutError: the command did not exit in time and was killed with its children.
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
                raise TimeoutError(f"{command} did not exit within {timeout_s:g} s") from error
            finally:
                end(process)
        if code != 0:
            raise RuntimeError(f"{command} exited with code {code}: {log.read_text(errors='replace')[-2_000:]}")
        figures: dict[str, Any] = json.loads(summary.read_bytes())
        return figures


def end(process: "subprocess.Popen[bytes]") -> None:
    """Terminate a process group, first with SIGTERM, then with SIGKILL."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(GRACE_S)
        except ProcessLookupError:  # no process is left
            return
        except subprocess.TimeoutExpired:
            continue
