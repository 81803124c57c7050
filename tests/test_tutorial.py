"""docs/tutorial.md, typed line by line into one shell as it stands there, with fewer images to train on."""

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
def all_ended(session: int, home: Path, jars_dir: Path) -> Iterator[None]:
    """Whatever the shell of this session started is gone after the block, the broker included."""
    try:
        yield
    finally:
        for process in psutil.process_iter():
            with suppress(ProcessLookupError, psutil.Error):
                if os.getsid(process.pid) == session:
                    process.send_signal(signal.SIGKILL)
        stop_broker(Settings(home=home, jars=jars_dir))


def test_the_tutorial_works_as_it_stands_there(jars_dir: Path, exported: ExportedBackbone, tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    (clone / ".imagestream").mkdir(parents=True)
    for shared in ("jars", "backbones"):
        (clone / ".imagestream" / shared).symlink_to(CHECKOUT / ".imagestream" / shared)
    script = ["set -m"]  # as in a shell that a person types into: Ctrl-C reaches what runs in the background
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
        all_ended(shell.pid, clone / "my-service" / "home", jars_dir),
    ):
        said, _ = shell.communicate(timeout=400)
    assert shell.returncode == 0, said
    answers = dict(re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", said, re.MULTILINE))
    assert list(answers) == list(dict.fromkeys(LINES))
    assert "version 1 is champion" in next(text for line, text in answers.items() if "train --images" in line)
    assert "100 predicted (version 1: 100), 1 quarantined" in answers["imagestream stream --until-drained"]
    assert "not_an_image" in next(text for line, text in answers.items() if "FROM quarantine" in line)
    assert "healthy" in answers["imagestream status"]
    assert "1 labels added" in answers["imagestream label corrections.csv --by me"]
    by_version = next(text for line, text in answers.items() if "GROUP BY ALL" in line)
    assert re.search(r"^ +1 +100 ", by_version, re.MULTILINE)
    assert re.search(r"^ +2 +\d+ ", by_version, re.MULTILINE)
    assert "clean: " in answers["imagestream audit"]
