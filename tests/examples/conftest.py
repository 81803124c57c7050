"""Examples run as their READMEs say, each in a process and a home of its own, on the broker that all tests share."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from streaming.settings import Settings
from tests.conftest import CHECKOUT

RunExample = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def run_example(broker: Settings, tmp_path_factory: pytest.TempPathFactory) -> RunExample:
    """Runs `python -m examples.NAME`; the outcome that it writes, and `home`, where it worked."""

    def run(name: str, *arguments: str | Path | int) -> dict[str, Any]:
        home = tmp_path_factory.mktemp(name) / "home"
        outcome = home.parent / "outcome.json"
        words = [*map(str, arguments), "--home", str(home), "--json", str(outcome)]
        environment = {
            "IMAGESTREAM_HOME": str(broker.home),
            "IMAGESTREAM_JARS": str(broker.jars),
            "IMAGESTREAM_BACKBONES": str(broker.backbones),
            "IMAGESTREAM_BOOTSTRAP_SERVERS": str(broker.bootstrap_servers),
            "IMAGESTREAM_TOPIC": f"{name}-{uuid4().hex[:8]}",
            "IMAGESTREAM_MASTER": "local[2]",
            "IMAGESTREAM_DRIVER_MEMORY": "1g",
        }
        done = subprocess.run(
            [sys.executable, "-m", f"examples.{name}", *words],
            cwd=CHECKOUT,
            env=os.environ | environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=500,
        )
        assert done.returncode == 0, f"{name}: {done.stdout}{done.stderr}"
        found: dict[str, Any] = json.loads(outcome.read_text(encoding="utf-8"))
        return found | {"home": home}

    return run
