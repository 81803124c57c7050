"""Options that retraining inherits from the champion's manifest unless they are given.

An option that depends on another one is not inherited if the other one is given: a logistic regression has no layers.
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
    """Return the options of a retraining, and those of them that are inherited from the champion.

    Args:
        manifest: the champion's manifest.
        given: names and values of `FitOptions` that were given; None for those that were not.

    Raises:
        ServiceError: see `FitOptions`.
        ModelError: see `FitOptions`.
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
        raise DamagedError(f"the champion's manifest contains options of the wrong type: {error}") from error


def objective_for(metric: str | None, threshold: str | None, champion: Bundle | None) -> Objective:
    """Return the objective by which a candidate is compared with the champion.

    It is the given metric, else the one that the candidate's threshold optimises, else the champion's, else accuracy.
    """
    return resolve_objective(metric, threshold) or (objective_of(champion.manifest) if champion else ACCURACY)


def objective_of(manifest: Manifest) -> Objective:
    """Return a model's objective; accuracy for a manifest of an earlier release, which does not contain it."""
    recorded = _recorded(manifest)
    return resolve_objective(recorded.get("metric"), recorded.get("threshold")) or ACCURACY


def _recorded(manifest: Manifest) -> dict[str, Any]:
    """Return the options in a manifest by their names in `FitOptions`.

    A trained CNN has the settings of an optimizer there instead; its head determines the kind of head.
    """
    kinds = {"projection": manifest.projection.kind, "classifier": manifest.classifier.kind}
    if manifest.classifier.kind in get_args(Scores):  # the network's own output layer: nothing was fitted
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
        raise DamagedError(f"the champion's manifest: expected layers such as 128,64, got {text!r}") from None
