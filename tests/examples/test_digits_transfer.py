from pathlib import Path
from typing import Any

import pytest

from tests.examples.conftest import RunExample

PER_CLASS = 8
IMAGES = 10 * PER_CLASS


@pytest.fixture(scope="module")
def outcome(run_example: RunExample) -> dict[str, Any]:
    options = ("--backbone", "efficientnet_lite0", "--input-size", 64, "--per-class", PER_CLASS, "--folds", 2)
    return run_example("digits_transfer", *options)


def test_every_image_is_on_one_side_of_the_split(outcome: dict[str, Any]) -> None:
    files = list((outcome["home"] / "images").rglob("*.png"))
    assert (len(files), outcome["rows_in"], outcome["rows_out"]) == (IMAGES, IMAGES, IMAGES)
    assert 0 < outcome["details"]["test images"] < IMAGES / 2


def test_pipeline_accuracy_is_far_above_chance(outcome: dict[str, Any]) -> None:
    details = outcome["details"]
    assert outcome["value"] > 0.4
    assert details["ROC AUC"] > 0.8
    assert details["accuracy"] == pytest.approx(details["recall"])  # equal if weighted by class
    assert 0 < details["precision"] <= 1
    assert details["tuned"]["F1 on the test images"] > 0.4


def test_saved_pipeline_contains_the_featurizer_and_the_classifier(outcome: dict[str, Any]) -> None:
    assert list(Path(outcome["details"]["pipeline"]).glob("stages/0_DeepImageFeaturizer_*/data/*.parquet"))
    assert list(Path(outcome["details"]["pipeline"]).glob("stages/1_LogisticRegression_*"))


def test_stream_predicts_every_image_with_the_tuned_model(outcome: dict[str, Any]) -> None:
    assert (outcome["published"], outcome["streamed"]) == (IMAGES, IMAGES)
    assert {Path(plot).name for plot in outcome["plots"]} == {"confusion.png", "roc.png", "samples.png"}
    assert all(Path(plot).read_bytes().startswith(b"\x89PNG") for plot in outcome["plots"])
