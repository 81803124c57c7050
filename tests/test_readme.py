"""The README's commands, run as they stand there."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from streaming.images.dataset import digit_images, write_images
from streaming.platform.broker import stop_broker
from streaming.settings import Settings

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```console\n(.*?)```", README, re.DOTALL)


def commands(block: str) -> list[list[str]]:
    """The commands of a console block, without their comments."""
    lines = [line.removeprefix("$ ") for line in block.splitlines() if line.startswith("$ ")]
    return [shlex.split(line, comments=True) for line in lines]


def run(command: list[str], folder: Path, environment: dict[str, str]) -> str:
    assert Path(command[0]).name == "imagestream"
    done = subprocess.run(
        [sys.executable, "-m", "streaming", *command[1:]],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def test_the_first_steps_with_images_of_your_own(jars_dir: Path, exports: Path, tmp_path: Path) -> None:
    own_images = next(block for block in BLOCKS if "imagestream train --images" in block)
    write_images(tmp_path / "photos", digit_images(120))
    write_images(tmp_path / "new-photos", digit_images(30, skip=120))
    first = min((tmp_path / "new-photos").rglob("*.png"))
    (tmp_path / "corrections.csv").write_text(f"name,label\n{first.name},{first.parent.name}\n")
    environment = {"IMAGESTREAM_JARS": str(jars_dir), "IMAGESTREAM_BACKBONES": str(exports)}
    home = tmp_path
    said: list[str] = []
    try:
        for command in commands(own_images):
            if command[0] == "export":
                name, value = command[1].split("=")
                environment[name] = value
                home = tmp_path / value
            else:
                said.append(run(command, tmp_path, environment))
    finally:
        stop_broker(Settings(home=home, jars=jars_dir))
    output = "\n".join(said)
    assert "30 predicted (version 1: 30), 0 quarantined" in output
    assert "version 2" in said[-2]


@pytest.mark.parametrize("target", re.findall(r"^    make (\w+)", README, re.MULTILINE))
def test_the_readmes_make_targets_exist(target: str) -> None:
    makefile = (Path(__file__).parent.parent / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"^{target}:", makefile, re.MULTILINE)
