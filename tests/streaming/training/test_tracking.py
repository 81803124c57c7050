"""Training runs logged to MLflow: read back from a file store if the package is installed."""

import sys
from pathlib import Path

import pytest

from streaming.errors import ServiceError
from streaming.settings import Settings, read_settings
from streaming.training.tracking import EXPERIMENT, check_tracking, track_run


def test_tracking_uri_is_read_from_mlflows_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert Settings().mlflow_tracking_uri is None
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    assert read_settings().mlflow_tracking_uri == "http://mlflow:5000"


def test_missing_mlflow_package_is_reported_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)  # as if it were not installed
    check_tracking(None)
    with pytest.raises(ServiceError, match=r"mlflow-skinny is not installed: pip install 'imagestream\[mlflow\]'"):
        check_tracking("http://mlflow:5000")


def test_run_is_logged_with_its_parameters_and_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = (tmp_path / "runs").as_uri()
    check_tracking(uri)
    for version in (1, 2):
        parameters = {"projection": "pca", "reg_param": 0.03, "weights": "x" * 10_000}
        metrics = {"accuracy": 0.9 + version / 100, "auc": float("nan")}
        track_run(uri, f"train: version {version}", parameters, metrics, {"version": version, "promoted": True})
    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    second, first = client.search_runs([experiment.experiment_id], order_by=["metrics.accuracy DESC"])
    assert first.data.metrics == {"accuracy": 0.91}
    assert second.data.metrics == {"accuracy": 0.92}
    assert second.data.params["reg_param"] == "0.03"
    assert (second.data.tags["version"], second.info.status) == ("2", "FINISHED")


def test_tracking_failure_is_reported_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ServiceError, match="the run .train. could not be logged to MLflow at file://") as failure:
        track_run((tmp_path / "file" / "runs").as_uri(), "train", {}, {}, {})
    assert "\n" not in str(failure.value)
