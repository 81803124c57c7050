"""What a retraining takes over from the champion: the options that define the model, unless others are given.

They are in the manifest's `fit` record. An option that depends on another one is not taken over where the other is
given, too: a logistic regression has no layers.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, get_args

from models.bundle import Bundle, Manifest
from models.classifier import Scores
from models.objective import ACCURACY, Objective, resolve_objective
from streaming.errors import DamagedError
from streaming.training.fit_options import NO_THRESHOLD, FitOptions

_OF_PROJECTION = ("explained_variance", "n_components", "eps")
_OF_CLASSIFIER = ("layers", "max_iter", "reg_param", "elastic_net", "block_size")
_REPLACED = {"explained_variance": ("n_components",), "eps": ("n_components",)}


def options_like(manifest: Manifest, given: Mapping[str, Any]) -> tuple[FitOptions, dict[str, Any]]:
    """(the options to retrain with, those of them that are the champion's).

    Args:
        given: by name, those of `FitOptions` that were given; None where one was not.

    Raises:
        ServiceError, ModelError: see `FitOptions`.
    """
    chosen = {name: value for name, value in given.items() if value is not None}
    recorded = _recorded(manifest)
    if chosen.get("threshold") == NO_THRESHOLD:
        chosen["threshold"] = None
    dropped = {name for one in chosen for name in _REPLACED.get(one, ())}
    if resolve_objective(None, chosen.get("threshold")):
        dropped.add("metric")
    for stage, names in (("projection", _OF_PROJECTION), ("classifier", _OF_CLASSIFIER)):
        if chosen.get(stage, recorded.get(stage)) != recorded.get(stage):
            dropped.update(names)
    inherited = {name: value for name, value in recorded.items() if name not in chosen and name not in dropped}
    try:
        return FitOptions(**{**inherited, **chosen}), inherited
    except TypeError as error:
        raise DamagedError(f"the champion's manifest keeps options of the wrong type: {error}") from error


def objective_for(metric: str | None, threshold: str | None, champion: Bundle | None) -> Objective:
    """What a candidate and the champion are compared by.

    That is the metric that was given, else what the candidate's threshold optimises, else what the champion is run for,
    else accuracy.
    """
    return resolve_objective(metric, threshold) or (objective_of(champion.manifest) if champion else ACCURACY)


def objective_of(manifest: Manifest) -> Objective:
    """What a model is run for, as its manifest says; accuracy for one that was made before manifests said so."""
    recorded = _recorded(manifest)
    return resolve_objective(recorded.get("metric"), recorded.get("threshold")) or ACCURACY


def _recorded(manifest: Manifest) -> dict[str, Any]:
    """The options that a manifest keeps, by their names in `FitOptions`, as `FitOptions.as_record` wrote them.

    A trained CNN has an optimizer's settings there instead; its head says what kind of head it is.
    """
    kinds = {"projection": manifest.projection.kind, "classifier": manifest.classifier.kind}
    if manifest.classifier.kind in get_args(Scores):  # a network that answers itself: nothing was fitted
        del kinds["classifier"]
    threshold = {} if manifest.threshold is None else {"threshold": repr(manifest.threshold)}
    known = {field.name for field in fields(FitOptions)}
    recorded: dict[str, Any] = {name: value for name, value in manifest.fit.items() if name in known}
    if "layers" in recorded:
        recorded["layers"] = _widths(str(recorded["layers"]))
    return kinds | threshold | {"seed": manifest.training_data.seed} | recorded


def _widths(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(width) for width in text.split(",") if width)
    except ValueError:
        raise DamagedError(f"the champion's manifest keeps layers such as 128,64, got {text!r}") from None
