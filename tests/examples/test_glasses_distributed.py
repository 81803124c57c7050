import csv
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from examples.glasses_distributed.__main__ import ModeResult, best_of, write_labels, write_table
from examples.glasses_distributed.faces import write_original_layout
from streaming.errors import ServiceError
from tests.examples.conftest import RunExample

PICTURES, UNDEFINED = 120, 12
MODE = "synchronous"


@pytest.fixture(scope="module")
def outcome(run_example: RunExample, exports_here: None, workers_with_tensorflow: None) -> dict[str, Any]:
    """In one mode: the others take the same path here, and tests/streaming/distributed compares their results."""
    options = ("--faces", PICTURES, "--size", 64, "--workers", 2, "--epochs", 2, "--frequency", "epoch", "--mode", MODE)
    return run_example("glasses_distributed", *options, small={"train-cnn": ("--input-size", 32)})


@pytest.fixture(scope="module")
def runs(outcome: dict[str, Any]) -> list[dict[str, str]]:
    with Path(outcome["details"]["every way"]).open(encoding="utf-8", newline="") as rows:
        return list(csv.DictReader(rows))


def test_unlabelled_pictures_are_counted_and_all_others_used(outcome: dict[str, Any]) -> None:
    assert len(list((outcome["home"] / "images" / "faces").glob("*.png"))) == PICTURES
    assert outcome["details"]["undefined labels, left out"] == UNDEFINED
    assert (outcome["rows_in"], outcome["rows_out"]) == (PICTURES - UNDEFINED, PICTURES - UNDEFINED)


def test_training_mode_has_a_row_and_learning_curves(outcome: dict[str, Any], runs: list[dict[str, str]]) -> None:
    (run,) = runs
    assert (run["mode"], run["frequency"], run["version"]) == (MODE, "epoch", "1")
    (plot,) = outcome["plots"]
    assert Path(plot).name == f"curves-{MODE}-epoch.png"
    assert Path(plot).read_bytes().startswith(b"\x89PNG")
    assert 0 < float(run["threshold"]) < 1
    assert float(run["megabytes"]) > 0
    assert float(run["test_log_loss"]) == pytest.approx(float(run["test_stable_log_loss"]), rel=1e-3)
    assert float(run["staleness"]) == 0  # a synchronous worker misses no update of the others


def test_stream_predicts_every_picture_with_the_best_model(outcome: dict[str, Any], runs: list[dict[str, str]]) -> None:
    assert outcome["details"]["best version"] == 1
    assert runs[0]["test_accuracy"] == str(outcome["value"])
    assert (outcome["published"], outcome["streamed"]) == (PICTURES, PICTURES)


def test_every_mode_has_a_row_and_the_most_accurate_one_is_best(tmp_path: Path) -> None:
    values: dict[str, Any] = {field.name: 0.5 for field in fields(ModeResult)}
    accuracies = {"synchronous": 0.8, "asynchronous": 0.9, "hogwild": 0.9}
    ways = [
        ModeResult(**values | {"mode": mode, "frequency": "batch", "version": version, "test_accuracy": accuracy})
        for version, (mode, accuracy) in enumerate(accuracies.items(), start=1)
    ]
    better = replace(ways[2], test_stable_log_loss=0.4, test_accuracy_at_half=None)
    assert best_of([*ways[:2], better]) is better
    assert best_of(ways[:2]) is ways[1]
    with write_table([*ways[:2], better], tmp_path / "ways.csv").open(encoding="utf-8", newline="") as file:
        rows = [*csv.DictReader(file)]
    assert [(row["mode"], float(row["test_accuracy"])) for row in rows] == [*accuracies.items()]
    assert rows[2]["test_accuracy_at_half"] == ""


def test_labels_are_joined_by_the_number_in_the_file_name(tmp_path: Path) -> None:
    faces = tmp_path / "faces"
    faces.mkdir()
    for number in (1, 2, 10, 11):
        (faces / f"face-{number}.png").touch()
    (tmp_path / "labels.csv").write_text("id,glasses,v1\n10,1,.5\n2,0,.5\n1,,.5\n12,1,.5\n", encoding="utf-8")
    counts = write_labels(tmp_path / "labels.csv", faces, tmp_path / "joined.csv")
    assert counts == (4, 2)  # one has an empty value, one has no row
    with (tmp_path / "joined.csv").open(encoding="utf-8", newline="") as rows:
        joined = {row["name"]: row["label"] for row in csv.DictReader(rows)}
    assert joined == {"face-1.png": "", "face-2.png": "no glasses", "face-10.png": "glasses", "face-11.png": ""}


def test_missing_csv_columns_or_pictures_are_rejected(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("id,label\n1,glasses\n", encoding="utf-8")
    with pytest.raises(ServiceError, match="expected the columns id and glasses, got"):
        write_labels(tmp_path / "labels.csv", tmp_path, tmp_path / "joined.csv")
    labels = write_original_layout(tmp_path / "drawn", 20, size=16)
    with pytest.raises(ServiceError, match="contains no face-N.png"):
        write_labels(labels, tmp_path, tmp_path / "joined.csv")
