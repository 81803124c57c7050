"""Logging of training runs to an MLflow server, if one is configured, in addition to the registry."""

import math
from collections.abc import Mapping
from typing import Any

from streaming.errors import ConfigurationError, UnavailableError

EXPERIMENT = "imagestream"
MAX_VALUE = 500  # MLflow's maximum length of a parameter or tag


def check_tracking(uri: str | None) -> None:
    """Check before a training that its run can be logged.

    Raises:
        ServiceError: a server is configured and its client package is not installed.
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
    """Log a finished training as a run of the experiment `imagestream`.

    Args:
        uri: URL of the server.
        parameters: parameters, truncated to MLflow's maximum length.
        metrics: metrics; those that are not finite are skipped.
        tags: tags, truncated to MLflow's maximum length.

    Raises:
        ServiceError: MLflow rejects the run; the registered version is not affected.
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
            metrics=[Metric(key, one, run.info.start_time, 0) for key, one in metrics.items() if math.isfinite(one)],
            params=[Param(key, str(value)[:MAX_VALUE]) for key, value in parameters.items()],
            tags=[RunTag(key, str(value)[:MAX_VALUE]) for key, value in tags.items()],
        )
        client.set_terminated(run.info.run_id)
    except (MlflowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise UnavailableError(f"the run {name!r} could not be logged to MLflow at {uri}: {reason}") from error
