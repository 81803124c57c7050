"""`imagestream train-cnn`: from a folder of images to a registered version."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from examples.glasses_distributed.faces import write_folders
from models.decode import decode
from models.scorer import check_golden, load_scorer
from streaming.distributed.checkpoint import read_checkpoint
from streaming.registry import open_registry
from streaming.settings import Settings
from tests.conftest import environment_of, imagestream, suspend

SIDE = 64
NETWORK = ("--input-size", SIDE, "--workers", 1, "--batch-size", 32, "--learning-rate", 0.002)


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_folders(tmp_path_factory.mktemp("faces") / "faces", 300, SIDE, 614)
    (folder / "glasses" / "bad.jpg").write_bytes(b"\xff\xd8 no more")
    return folder


@pytest.fixture
def settings(tmp_path: Path, jars_dir: Path) -> Settings:
    return Settings(home=tmp_path, jars=jars_dir)


@pytest.mark.usefixtures("exports_here", "workers_with_tensorflow")
def test_killed_and_interrupted_training_resumes_and_is_registered(
    settings: Settings, faces: Path, tmp_path: Path
) -> None:
    """One process shows both: the files that a kill would leave are copied while it is suspended."""
    killed = settings.model_copy(update={"home": tmp_path / "killed"})
    output = _suspend_and_interrupt(settings, faces, killed.work_dir / "train-cnn")
    assert "interrupted; run it again with --resume" in output
    assert "Traceback" not in output
    early, late = (read_checkpoint(one.work_dir / "train-cnn").state.epoch for one in (killed, settings))
    assert 2 <= early <= late - 2
    for home, epochs in ((killed, early + 1), (settings, max(late + 1, 6))):
        to_the_end = ("--epochs", epochs, "--threshold", "f1", "--resume")
        result = imagestream(home, "train-cnn", "--images", faces, *NETWORK, *to_the_end)
        assert (result["version"], result["promoted"], result["left_out"]) == (1, True, 1)
        assert [epoch["epoch"] for epoch in result["history"]["epochs"]] == list(range(epochs))
    _check_result(result, epochs)
    _check_model(settings, faces, result)


def _check_result(result: dict[str, Any], epochs: int) -> None:
    history = result["history"]
    assert (history["mode"], history["workers"]) == ("synchronous", 1)
    curves = Path(result["learning_curves"])
    assert curves.read_bytes().startswith(b"\x89PNG")
    assert len(json.loads(curves.with_name("history.json").read_text())["epochs"]) == epochs
    rows = [sum(worker["training"]["rows"] for worker in epoch["workers"]) for epoch in history["epochs"]]
    validated = [sum(worker["validation"]["rows"] for worker in epoch["workers"]) for epoch in history["epochs"]]
    assert len(set(rows)) == len(set(validated)) == 1
    assert rows[0] + validated[0] == result["training_rows"]
    assert result["training_metrics"]["accuracy"] > 0.75
    assert 0.5 <= result["metrics_at_half"]["accuracy"] <= 1.0


def _check_model(settings: Settings, faces: Path, result: dict[str, Any]) -> None:
    """The registered model predicts as the trained network."""
    bundle = open_registry(settings.home).read(1)
    assert bundle.manifest.training_data.holdout_rows + result["training_rows"] == 300
    scorer = load_scorer(bundle)
    check_golden(bundle, scorer)
    assert bundle.manifest.backbone.name == "cnn_gray"
    assert bundle.manifest.backbone.weights == "trained"
    assert bundle.manifest.threshold is not None
    assert bundle.manifest.fit["mode"] == "synchronous"
    with_glasses = sorted((faces / "glasses").glob("face-*.jpg"))[:60]
    images = np.stack([decode(path.read_bytes(), (SIDE, SIDE)) for path in with_glasses])
    answers = scorer.probabilities(scorer.features(images))
    assert (answers[:, bundle.manifest.classes.index("glasses")] > 0.5).mean() > 0.6


def _suspend_and_interrupt(settings: Settings, faces: Path, copy: Path) -> str:
    """Run the real command, copy its checkpoint after two epochs, interrupt it after four; returns its last output."""
    options = map(str, [*NETWORK, "--epochs", 40])
    running = subprocess.Popen(
        [sys.executable, "-m", "streaming", "--home", settings.home, "train-cnn", "--images", faces, *options],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment_of(settings),
        start_new_session=True,
    )
    assert running.stderr is not None
    reported: list[str] = []
    for epochs in (2, 4):
        while not reported or not reported[-1].startswith(f"epoch {epochs}/"):
            reported.append(running.stderr.readline())
            assert reported[-1].startswith("epoch "), reported  # no end, and no messages of TensorFlow
        if epochs == 2:
            os.killpg(running.pid, signal.SIGSTOP)
            suspend(running.pid)
            shutil.copytree(settings.work_dir / "train-cnn", copy)
            os.killpg(running.pid, signal.SIGCONT)
    os.killpg(running.pid, signal.SIGINT)
    output = running.stderr.read()
    assert running.wait(300) == 130
    return output


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--mode", "sideways"], "sideways"),
        (["--workers", 0], "workers should be at least 1"),
        (["--class-weight", "glasses"], "--class-weight: expected CLASS=WEIGHT"),
        (["--architecture", "cnn_grey"], "did you mean cnn_gray"),
        (["--resume"], "no training to resume"),
    ],
)
def test_invalid_options_are_reported_in_one_line(
    settings: Settings, faces: Path, arguments: list[str], why: str
) -> None:
    code = 1 if arguments[0] in {"--resume", "--architecture"} else 2
    command = ("train-cnn", "--images", faces, "--input-size", SIDE, *arguments)
    error = imagestream(settings, *command, code=code)["stderr"]
    assert why in error
    assert "Traceback" not in error
