"""The options that retraining inherits from the champion, and the objective by which the two are compared."""

from dataclasses import replace
from typing import Any

import pytest

from models.bundle import BackboneEntry, Manifest, StageEntry, TrainingData
from models.errors import ModelError
from models.objective import Objective
from streaming.cli.train import changed_by
from streaming.errors import ServiceError
from streaming.training.fit_options import FitOptions
from streaming.training.inherit import objective_of, options_like

BACKBONE = BackboneEntry(
    name="pixels", weights="none", input_size=(8, 8), scale=1, offset=0, output="flat", n_features=192, parity=0
)
TUNED = FitOptions(
    projection="random",
    n_components=20,
    classifier="mlp",
    layers=(24, 16),
    max_iter=30,
    threshold="cost:1:5",
    metric="cost:1:5",
    holdout=0.3,
    seed=7,
)


def manifest(options: FitOptions | None = None, **changed: Any) -> Manifest:
    values: dict[str, Any] = {
        "backbone": BACKBONE,
        "projection": StageEntry(kind="random", n_in=192, n_out=20),
        "classifier": StageEntry(kind="mlp", n_in=20, n_out=2),
        "classes": ("a", "b"),
        "metrics": {},
        "training_data": TrainingData(rows=9, holdout_rows=3, fingerprint="0" * 64, seed=7),
        "fit": options.as_record() if options else {},
        "libraries": {},
    }
    return Manifest.model_validate_json(Manifest(**(values | changed)).model_dump_json())


def test_retraining_without_options_inherits_those_of_the_champion() -> None:
    for options in (TUNED, FitOptions(seed=7), FitOptions(n_components=5, seed=7, layers=())):
        found, inherited = options_like(manifest(options), {})
        assert found == options
        assert {"threshold", "classifier", "seed"} & {
            name for name, value in options.as_record().items() if value
        } <= set(inherited)


@pytest.mark.parametrize(
    ("given", "changes"),
    [
        ({"threshold": "none"}, {"threshold": None}),  # its objective remains
        ({"threshold": "0.4"}, {"threshold": "0.4"}),
        ({"metric": "accuracy"}, {"metric": "accuracy"}),
        ({"max_iter": 50, "seed": None}, {"max_iter": 50}),
        ({"layers": (8,)}, {"layers": (8,)}),
        ({"classifier": "mlp"}, {}),
        # Options of the other classifier or projection are not inherited.
        (
            {"classifier": "logistic_regression"},
            {"classifier": "logistic_regression", "layers": (128,), "max_iter": 100},
        ),
        ({"projection": "pca"}, {"projection": "pca", "n_components": None}),
        ({"eps": 0.3}, {"eps": 0.3, "n_components": None}),
    ],
)
def test_given_option_overrides_the_inherited_one(given: dict[str, Any], changes: dict[str, Any]) -> None:
    found, inherited = options_like(manifest(TUNED), given)
    kept = {"metric": "cost:1:5"} | changes
    assert found == replace(TUNED, **kept)
    assert not set(inherited) & {name for name, value in given.items() if value is not None}


def test_threshold_with_another_objective_replaces_the_metric() -> None:
    found, inherited = options_like(manifest(TUNED), {"threshold": "cost:3:1"})
    assert (found.threshold, found.metric) == ("cost:3:1", None)
    assert "metric" not in inherited


def test_incomplete_manifest_keeps_the_stages_of_the_champion() -> None:
    record = {"mode": "synchronous", "epochs": 3, "optimizer": "adam", "seed": 7}
    head = {
        "projection": StageEntry(kind="none", n_in=192, n_out=192),
        "classifier": StageEntry(kind="logistic_regression", n_in=192, n_out=2),
        "threshold": 0.25,
    }
    found, inherited = options_like(manifest(**head, fit=record), {})
    assert found == FitOptions(projection="none", threshold="0.25", seed=7)
    assert inherited == {"projection": "none", "classifier": "logistic_regression", "threshold": "0.25", "seed": 7}
    assert objective_of(manifest(**head)) == Objective()


def test_objective_is_read_from_the_manifest() -> None:
    assert objective_of(manifest(TUNED)) == Objective("cost", (1, 5))
    assert objective_of(manifest(replace(TUNED, metric="log_loss"))) == Objective("log_loss")
    assert objective_of(manifest(replace(TUNED, metric=None))) == Objective("cost", (1, 5))  # an older manifest
    assert objective_of(manifest(replace(TUNED, metric=None, threshold="f1"))) == Objective("f1")
    assert objective_of(manifest()) == Objective()


def test_inherited_options_are_reported_unless_default() -> None:
    _, inherited = options_like(manifest(FitOptions(threshold="cost:1:5", reg_param=0.1)), {"max_iter": 5})
    assert changed_by(inherited) == "reg param 0.1, threshold cost:1:5"
    assert changed_by(options_like(manifest(FitOptions(), projection=BACKBONE_PCA), {})[1]) == ""


BACKBONE_PCA = StageEntry(kind="pca", n_in=192, n_out=20)


@pytest.mark.parametrize("fit", [{"layers": "wide"}, {"max_iter": "many"}, {"metric": "beauty"}, {"eps": 7.0}])
def test_invalid_manifest_is_rejected(fit: dict[str, Any]) -> None:
    with pytest.raises((ServiceError, ModelError), match=r"layers such as|wrong type|a metric is|eps should be"):
        options_like(manifest(fit=fit), {})
