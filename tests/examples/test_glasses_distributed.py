import csv
from pathlib import Path
from typing import Any

import pytest

from examples.glasses_distributed.__main__ import write_labels
from examples.glasses_distributed.faces import write_original_layout
from streaming.errors import ServiceError
from tests.examples.conftest import RunExample

PICTURES, UNDEFINED = 120, 12
MODES = ("synchronous", "hogwild")


@pytest.fixture(scope="module")
def outcome(run_example: RunExample) -> dict[str, Any]:
    options = ("--faces", PICTURES, "--size", 160, "--workers", 2, "--epochs", 2, "--frequency", "epoch")
    return run_example("glasses_distributed", *options, *(word for mode in MODES for word in ("--mode", mode)))


@pytest.fixture(scope="module")
def runs(outcome: dict[str, Any]) -> list[dict[str, str]]:
    with Path(outcome["details"]["every way"]).open(encoding="utf-8", newline="") as rows:
        return list(csv.DictReader(rows))


def test_unlabelled_pictures_are_counted_and_all_others_used(outcome: dict[str, Any]) -> None:
    assert len(list((outcome["home"] / "images" / "faces").glob("*.png"))) == PICTURES
    assert outcome["details"]["undefined labels, left out"] == UNDEFINED
    assert (outcome["rows_in"], outcome["rows_out"]) == (PICTURES - UNDEFINED, PICTURES - UNDEFINED)


def test_every_training_mode_has_a_row_and_learning_curves(outcome: dict[str, Any], runs: list[dict[str, str]]) -> None:
    assert [(run["mode"], run["frequency"]) for run in runs] == [(mode, "epoch") for mode in MODES]
    assert [run["version"] for run in runs] == ["1", "2"]
    assert [Path(plot).name for plot in outcome["plots"]] == [f"curves-{mode}-epoch.png" for mode in MODES]
    assert all(Path(plot).read_bytes().startswith(b"\x89PNG") for plot in outcome["plots"])
    for run in runs:
        assert 0 < float(run["threshold"]) < 1
        assert float(run["megabytes"]) > 0
        assert float(run["test_log_loss"]) == pytest.approx(float(run["test_stable_log_loss"]), rel=1e-3)
    assert float(runs[0]["staleness"]) == 0  # a synchronous worker misses no update of the others


def test_stream_predicts_every_picture_with_the_best_model(outcome: dict[str, Any], runs: list[dict[str, str]]) -> None:
    assert outcome["value"] == max(float(run["test_accuracy"]) for run in runs)
    assert runs[outcome["details"]["best version"] - 1]["test_accuracy"] == str(outcome["value"])
    assert (outcome["published"], outcome["streamed"]) == (PICTURES, PICTURES)


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
