"""docs/tutorial.md, typed line by line into one shell as written, with fewer training images."""

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from models.backbone import ExportedBackbone
from streaming.platform.broker import stop_broker
from streaming.settings import Settings

CHECKOUT = Path(__file__).parent.parent
TUTORIAL = (CHECKOUT / "docs" / "tutorial.md").read_text(encoding="utf-8")
LINES = [
    line.removeprefix("$ ").replace("digit_images(500)", "digit_images(150)")
    for block in re.findall(r"^```console\n(.*?)^```", TUTORIAL, re.DOTALL | re.MULTILINE)
    for line in block.splitlines()
    if line.startswith("$ ")
]


@contextmanager
def all_killed(session: int, home: Path, jars_dir: Path) -> Iterator[None]:
    """After the block, kill all processes of this session, and stop the broker."""
    try:
        yield
    finally:
        for process in psutil.process_iter():
            with suppress(ProcessLookupError, psutil.Error):
                if os.getsid(process.pid) == session:
                    process.send_signal(signal.SIGKILL)
        stop_broker(Settings(home=home, jars=jars_dir))


def test_tutorial_works_as_written(jars_dir: Path, exported: ExportedBackbone, tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    (clone / ".imagestream").mkdir(parents=True)
    for shared in ("jars", "backbones"):
        (clone / ".imagestream" / shared).symlink_to(CHECKOUT / ".imagestream" / shared)
    script = ["set -m"]  # job control as in an interactive shell, so that Ctrl-C reaches background jobs
    for line in LINES:
        script += [f"echo {shlex.quote('$ ' + line)}", f"{line}\n[ $? = 0 ] || exit 1"]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("IMAGESTREAM_")}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with (
        subprocess.Popen(
            ["/bin/bash", "-c", "\n".join(script)],
            cwd=clone,
            env=inherited | {"PATH": path, "PYTHONPATH": str(CHECKOUT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        ) as shell,
        all_killed(shell.pid, clone / "my-service" / "home", jars_dir),
    ):
        output, _ = shell.communicate(timeout=400)
    assert shell.returncode == 0, output
    outputs = dict(re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", output, re.MULTILINE))
    assert list(outputs) == list(dict.fromkeys(LINES))
    assert "version 1 is champion" in next(text for line, text in outputs.items() if "train --images" in line)
    assert "100 predicted (version 1: 100), 1 quarantined" in outputs["imagestream stream --until-drained"]
    assert "not_an_image" in next(text for line, text in outputs.items() if "FROM quarantine" in line)
    assert "healthy" in outputs["imagestream status"]
    assert "1 labels added" in outputs["imagestream label corrections.csv --by me"]
    by_version = next(text for line, text in outputs.items() if "GROUP BY ALL" in line)
    assert re.search(r"^ +1 +100 ", by_version, re.MULTILINE)
    assert re.search(r"^ +2 +\d+ ", by_version, re.MULTILINE)
    assert "clean: " in outputs["imagestream audit"]
