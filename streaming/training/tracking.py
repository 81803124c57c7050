"""Runs of training told to MLflow, where the settings name its server; beside the registry, never in its place."""

import math
from collections.abc import Mapping
from typing import Any

from streaming.errors import ConfigurationError, UnavailableError

EXPERIMENT = "imagestream"
MAX_VALUE = 500  # characters of a parameter or tag, as MLflow stores them


def check_tracking(uri: str | None) -> None:
    """Find out before a training, rather than after it, that its run could not be told.

    Raises:
        ServiceError: a server is named, and the package that speaks to it is not installed.
    """
    if uri is None:
        return
    try:
        import mlflow  # type: ignore[import-not-found,unused-ignore]  # noqa: F401
    except ImportError as error:
        raise ConfigurationError(
            "MLFLOW_TRACKING_URI is set, and the package mlflow-skinny is not installed: "
            "pip install 'imagestream[mlflow]', or unset the variable"
        ) from error


def track_run(
    uri: str, name: str, parameters: Mapping[str, Any], metrics: Mapping[str, float], tags: Mapping[str, Any]
) -> None:
    """Record one finished training as a run of the experiment `imagestream`.

    Raises:
        ServiceError: MLflow does not take it; what was registered stays registered.
    """
    from mlflow import MlflowClient  # type: ignore[import-not-found,unused-ignore]
    from mlflow.entities import Metric, Param, RunTag  # type: ignore[import-not-found,unused-ignore]
    from mlflow.exceptions import MlflowException  # type: ignore[import-not-found,unused-ignore]

    try:
        client = MlflowClient(uri)
        experiment = client.get_experiment_by_name(EXPERIMENT)
        identity = experiment.experiment_id if experiment else client.create_experiment(EXPERIMENT)
        run = client.create_run(identity, run_name=name)
        client.log_batch(
            run.info.run_id,
            metrics=[Metric(key, value, run.info.start_time, 0) for key, value in metrics.items() if _finite(value)],
            params=[Param(key, str(value)[:MAX_VALUE]) for key, value in parameters.items()],
            tags=[RunTag(key, str(value)[:MAX_VALUE]) for key, value in tags.items()],
        )
        client.set_terminated(run.info.run_id)
    except (MlflowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise UnavailableError(f"the run {name!r} could not be told to MLflow at {uri}: {reason}") from error


def _finite(value: float) -> bool:
    return math.isfinite(value)
