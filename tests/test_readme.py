"""The README's commands run as printed."""

import re
import shlex
from contextlib import chdir
from pathlib import Path

import pytest

from streaming.images.dataset import digit_images, write_images
from streaming.platform.broker import stop_broker
from streaming.settings import Settings
from tests.conftest import SPARK, command_here, command_process, environment

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
SMALL = ("--input-size", 64, "--max-iter", 10)  # added to `train`, and inherited by `retrain`
BLOCKS = re.findall(r"```console\n(.*?)```", README, re.DOTALL)


def block_with(command: str) -> str:
    return next(block for block in BLOCKS if command in block)


def run_block(block: str, folder: Path) -> list[str]:
    """Run the commands of a console block in `folder`, with the variables that it exports; returns their outputs."""
    outputs = []
    with chdir(folder), pytest.MonkeyPatch.context() as patch:
        for line in block.splitlines():
            program, *words = shlex.split(line.removeprefix("$ "), comments=True)
            if program == "export":
                name, value = words[0].split("=")
                patch.setenv(name, value)
                continue
            assert program == ".venv/bin/imagestream"  # in a clone, imagestream is not on the path
            # The workers of the shared Spark session run in another folder, so relative paths need a new process.
            run, small = (command_process, SMALL) if words[0] == "train" else (command_here, ())
            code, out, err = run(*words, *small)
            assert code == 0, f"{line}: {out}{err}"
            outputs.append(out + err)
    return outputs


def test_first_steps_with_your_images_work(jars_dir: Path, exports: Path, tmp_path: Path) -> None:
    SPARK.start(tmp_path, jars_dir)
    write_images(tmp_path / "photos", digit_images(60))
    write_images(tmp_path / "new-photos", digit_images(12, skip=60))
    first = min((tmp_path / "new-photos").rglob("*.png"))
    (tmp_path / "corrections.csv").write_text(f"name,label\n{first.name},{first.parent.name}\n")
    try:
        with environment(IMAGESTREAM_JARS=str(jars_dir), IMAGESTREAM_BACKBONES=str(exports)):
            outputs = run_block(block_with("imagestream train --images"), tmp_path)
    finally:
        stop_broker(Settings(home=tmp_path / "my-service", jars=jars_dir))
    assert "12 predicted (version 1: 12), 0 quarantined" in "\n".join(outputs)
    assert "version 2" in outputs[-2]


@pytest.mark.parametrize("target", re.findall(r"^    make (\w+)", README, re.MULTILINE))
def test_make_targets_in_the_readme_exist(target: str) -> None:
    makefile = (Path(__file__).parent.parent / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"^{target}:", makefile, re.MULTILINE)
