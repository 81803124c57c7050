"""Third-party models: imported with the command line, and served by the stream like any other version."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from deltalake import DeltaTable, QueryBuilder

from models.recipe import Recipe
from streaming.images.dataset import digit_images, write_images
from streaming.registry import CHALLENGER, CHAMPION, open_registry
from streaming.settings import Settings
from streaming.training import tune
from streaming.training.fit_options import FitOptions, GateOptions
from streaming.training.gate import Verdict
from streaming.training.job import Job
from tests.conftest import imagestream
from tests.models import onnx_graphs as graphs

N = 24


def rows(settings: Settings, table: str, sql: str) -> list[dict[str, Any]]:
    found = QueryBuilder().register(table, DeltaTable(settings.place.table(table))).execute(sql)
    return pa.table(found.read_all()).to_pylist()


def softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(exponentials / exponentials.sum(axis=1, keepdims=True))


@pytest.fixture
def home(tmp_path: Path) -> Settings:
    (tmp_path / "home").mkdir()
    return Settings(home=str(tmp_path / "home"), backbones=tmp_path / "backbones")


def test_imported_model_predicts_as_in_its_original_framework(service: Settings, tmp_path: Path) -> None:
    path = graphs.save(graphs.classifier(), tmp_path / "third party.onnx")
    names = tmp_path / "names.txt"
    names.write_text("\n".join(f"digit {n}" for n in range(10)), "utf-8")

    model = imagestream(
        service, "models", "import", path, "--classes", names, "--preset", "torchvision", "--alias", "champion"
    )

    write_images(tmp_path / "digits", digit_images(N))
    imagestream(service, "publish", tmp_path / "digits", "--label-from", "parent")
    summary = imagestream(service, "stream", "--until-drained")
    assert (summary["predicted"], model["version"], model["scores"]) == (N, 2, "logits")
    recipe = Recipe.model_validate(model["network"]["recipe"])
    found = rows(service, "predictions", "SELECT * FROM predictions")
    assert len(found) == N
    pixels = np.stack([recipe.pixels(Path(row["source"]).read_bytes()) for row in found])
    expected = softmax(graphs.logits_of(recipe.tensor(pixels)))
    assert [row["label"] for row in found] == [f"digit {n}" for n in expected.argmax(axis=1)]
    np.testing.assert_allclose([row["confidence"] for row in found], expected.max(axis=1), atol=1e-4)
    assert {(row["model_version"], row["bundle_sha256"]) for row in found} == {(2, model["bundle_sha256"])}
    # A head can be fitted on its outputs, as on any other features.
    again = imagestream(service, "retrain", "--margin", "-0.99", "--projection", "none", "--max-iter", 3)
    assert open_registry(service.home).manifest(again["version"]).classifier.kind == "logistic_regression"


def test_first_imported_model_becomes_champion_and_is_not_registered_twice(home: Settings, tmp_path: Path) -> None:
    path = graphs.save(
        graphs.classifier(softmax=True, metadata={"names": "{0: 'cat', 1: 'dog'}"}, n_classes=2), tmp_path / "two.onnx"
    )
    first = imagestream(home, "models", "import", path)
    assert (first["version"], first["champion"], first["new"], first["scores"]) == (1, True, True, "probabilities")
    again = imagestream(home, "models", "import", path, "--alias", "challenger")
    assert (again["version"], again["new"]) == (1, False)
    registry = open_registry(home.home)
    assert (registry.target(CHAMPION), registry.target(CHALLENGER)) == (1, 1)
    assert registry.manifest(1).classes == ("cat", "dog")
    imagestream(home, "models", "verify", 1)
    assert imagestream(home, "models", "list")["versions"][0]["metrics"] == {}


@pytest.mark.parametrize(
    ("model", "options", "reason"),
    [
        ({}, ["--classes", "absent.txt"], "class names in absent.txt cannot be read: No such file"),
        ({}, ["--classes", "two.txt"], "outputs 10 scores: expected as many class names, got 2"),
        ({}, ["--classes", "twice.txt"], "names the class 'a' twice"),
        ({}, ["--input-size", "64"], "its input is 32×32 pixels .* got 64×64"),
        ({}, ["--channels", "gray"], "its input has 3 channels, --channels gray does not match"),
        ({}, ["--resize", "half"], "--resize: expected stretch or the shorter side in pixels, got 'half'"),
        ({}, ["--mean", "0.5,0.5"], "mean: expected one value or 3, got 2"),
        ({"side": "side"}, ["--input-size", "4000"], "input_size.0: .* less than or equal"),
        ({"metadata": {"names": "os.system('true')"}}, [], "not a list of class names|names 1 classes"),
    ],
)  # fmt: skip
def test_invalid_import_is_rejected_in_one_line(
    home: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model: dict[str, Any],
    options: list[str],
    reason: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("two.txt").write_text("a\nb\n")
    Path("twice.txt").write_text('["a", "b", "a"]')
    path = graphs.save(graphs.classifier(**model), tmp_path / "model.onnx")
    error = imagestream(home, "models", "import", path, *options, code=(1, 2))["stderr"]
    assert len(error.strip().splitlines()) == 1
    assert re.search(reason, error), error
    assert not open_registry(home.home).versions()


def test_head_can_be_fitted_on_any_tensor_of_a_model(home: Settings, jars_dir: Path, tmp_path: Path) -> None:
    """Pooled here; `tune` below uses the same tensor without pooling, `retrain` above the scores."""
    service = home.model_copy(update={"jars": jars_dir})
    path = graphs.save(graphs.classifier(), tmp_path / "net.onnx")
    options = ("--backbone", f"{path}:active", "--pooled", "--preset", "raw", "--projection", "none")
    model = imagestream(service, "train", "--dataset", "digits", "--limit", 60, *options, "--max-iter", 3)
    manifest = open_registry(service.home).manifest(model["version"])
    entry = manifest.backbone
    assert (entry.name, entry.n_features, manifest.classifier.kind) == ("net", 8, "logistic_regression")
    assert entry.network is not None
    assert (entry.network.tensor, entry.network.recipe.scale) == ("active", 1.0)
    imagestream(service, "models", "verify", model["version"])
    error = imagestream(service, "train", "--dataset", "digits", "--backbone", f"{path}:absent", code=1)["stderr"]
    assert "computes no tensor 'absent'" in error


def test_version_can_be_exported_imported_elsewhere_and_deleted(home: Settings, tmp_path: Path) -> None:
    path = graphs.save(graphs.classifier(), tmp_path / "net.onnx")
    imagestream(home, "models", "import", path)
    imagestream(home, "models", "import", path, "--mean", "0.5", "--alias", "challenger")
    file = tmp_path / "model.zip"
    exported = imagestream(home, "models", "export", 2, file)
    assert exported["bytes"] == file.stat().st_size
    there = home.model_copy(update={"home": str(tmp_path / "there")})
    error = imagestream(there, "models", "import", file, "--mean", "0.5", code=2)["stderr"]
    assert "expected no preprocessing or class options" in error
    found = imagestream(there, "models", "import", file)
    sha256 = exported["bundle_sha256"]
    assert found == {"version": 1, "bundle_sha256": sha256, "new": True, "champion": True}
    assert imagestream(there, "models", "import", file)["new"] is False
    assert imagestream(there, "models", "verify", 1)["bundle_sha256"] == sha256

    assert "version 2 is the challenger" in imagestream(home, "models", "delete", 2, code=1)["stderr"]
    assert imagestream(home, "models", "clear")["version"] is None
    assert imagestream(home, "models", "delete", 2) == {"deleted": 2}
    assert "version 2 was deleted by" in imagestream(home, "models", "promote", 2, code=1)["stderr"]
    assert [one["version"] for one in imagestream(home, "models", "list")["versions"]] == [1]


def test_no_promote_keeps_the_champion_even_if_the_gate_passes(home: Settings, tmp_path: Path) -> None:
    registry = open_registry(home.home)
    job = Job(home, None, registry, None, GateOptions(promote=False), print, "train")
    verdict = job._promoted(1, Verdict(True, "the first model"), None)
    assert (verdict.promote, verdict.why) == (False, "promotion is disabled (--no-promote); the gate: the first model")
    assert registry.target(CHAMPION) is None


def test_tune_searches_on_a_tensor_of_an_imported_model(
    home: Settings, jars_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = home.model_copy(update={"jars": jars_dir})
    path = graphs.save(graphs.classifier(), tmp_path / "net.onnx")
    images = tmp_path / "images"
    write_images(images, digit_images(60))
    network = ("--backbone", f"{path}:active")
    little = ("--trials", 1, "--classifiers", "logistic_regression", "--projections", "none")
    monkeypatch.setattr(tune, "FitOptions", partial(FitOptions, max_iter=3))  # 100 by default, each a Spark job
    found = imagestream(service, "tune", "--images", images, *network, *little)
    assert f"train --images {images} --backbone {path}:active --projection none" in found["command"]
    (guessed,) = found["warnings"]
    assert guessed.startswith("guessed preset: ")
    error = imagestream(service, "tune", "--images", images, *network, "--precisions", "int8", code=(1, 2))["stderr"]
    assert "--precisions does not apply to a backbone from a file" in error
    error = imagestream(service, "tune", *network, "--preset", "raw", code=2)["stderr"]
    assert "give the images with --images or --dataset" in error
