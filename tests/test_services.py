"""The shared services: one broker for all processes of a run, which stops if the run is interrupted."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import psutil

from tests.conftest import CHECKOUT
from tests.faults.harness import has_ended, wait_until
from tests.services import BROKER

USES_THE_BROKER = "tests/producer/test_watch.py"


def test_interrupted_run_leaves_no_broker_behind(jars_dir: Path, tmp_path: Path) -> None:
    options = ["-q", "-p", "no:cacheprovider", "-n", "1", f"--basetemp={tmp_path / 'run'}"]
    command = [sys.executable, "-m", "pytest", *options, USES_THE_BROKER]
    with subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.PIPE, text=True, start_new_session=True) as run:
        state = tmp_path / "run" / BROKER / "broker" / "broker.json"
        wait_until(lambda: state.is_file() and run.poll() is None, lambda: "no test started the broker")
        broker = psutil.Process(json.loads(state.read_text(encoding="utf-8"))["pid"])
        run.send_signal(signal.SIGINT)
        output, _ = run.communicate(timeout=300)
    assert run.returncode == 2, output  # pytest's exit code for an interrupted run
    assert has_ended(broker.pid), output
