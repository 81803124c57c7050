"""The search space of `tune`, and the command line for given settings."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from math import floor, log10
from typing import Any, Protocol

from models.errors import ModelError
from models.projection import check_pca_memory
from models.random_projection import johnson_lindenstrauss_dim
from streaming.errors import ConfigurationError
from streaming.training.fit_options import ClassifierKind, FitOptions, ProjectionKind

SHARES = (0.50, 0.99)  # explained variance
MAX_EPS = 0.9
SKETCHED = (16, 256)  # components of a randomized PCA, for features too wide for an exact PCA
REG = (1e-4, 0.3)
WIDTHS = (16, 32, 64, 128, 256)
MAX_DEPTH = 2
ITERATIONS = (50, 100, 200)
DIGITS = 3  # significant digits of a setting, so that the command line reproduces it exactly

FLAGS = {"n_components": "--components", "reg_param": "--reg"}  # other flags are named after the field


class Trial(Protocol):
    """The methods of an Optuna trial that are used."""

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any: ...

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int: ...


@dataclass(frozen=True)
class Space:
    """A search space for features of one width.

    Attributes:
        lowest_eps: smallest eps for which a random projection is narrower than the features.
        base: the settings that are not searched.
    """

    projections: tuple[ProjectionKind, ...]
    classifiers: tuple[ClassifierKind, ...]
    lowest_eps: float
    base: FitOptions

    def suggest(self, trial: Trial) -> FitOptions:
        """Return the settings of a trial."""
        projection: ProjectionKind = trial.suggest_categorical("projection", self.projections)
        options = replace(self.base, projection=projection)
        match projection:
            case "pca":
                share = trial.suggest_float("explained_variance", *SHARES)
                options = replace(options, explained_variance=_rounded(share))
            case "randomized_pca":
                options = replace(options, n_components=trial.suggest_int("components", *SKETCHED, log=True))
            case "random":
                options = replace(options, eps=_rounded(trial.suggest_float("eps", self.lowest_eps, MAX_EPS)))
        classifier: ClassifierKind = trial.suggest_categorical("classifier", self.classifiers)
        if classifier == "mlp":
            depth = trial.suggest_int("depth", 1, MAX_DEPTH)
            layers = tuple(trial.suggest_categorical(f"width_{layer}", WIDTHS) for layer in range(depth))
            iterations = trial.suggest_categorical("iterations", ITERATIONS)
            return replace(options, classifier=classifier, layers=layers, max_iter=iterations)
        reg = trial.suggest_float("reg", *REG, log=True)
        elastic_net = trial.suggest_float("elastic_net", 0.0, 1.0)
        return replace(options, classifier=classifier, reg_param=_rounded(reg), elastic_net=_rounded(elastic_net))

    def defaults(self) -> dict[str, Any]:
        """Return the suggestions for the default settings of training, if they are in this space."""
        known = {
            "projection": self.base.projection,
            "explained_variance": self.base.explained_variance,
            "classifier": self.base.classifier,
            "reg": self.base.reg_param,
            "elastic_net": self.base.elastic_net,
        }
        if self.base.projection not in self.projections:
            known.pop("projection")
            known.pop("explained_variance")
        if self.base.classifier not in self.classifiers:
            known = {name: value for name, value in known.items() if name not in {"classifier", "reg", "elastic_net"}}
        return known


def make_space(
    projections: Sequence[ProjectionKind],
    classifiers: Sequence[ClassifierKind],
    n_features: int,
    n_rows: int,
    base: FitOptions,
) -> Space:
    """Return the search space; an exact PCA that exceeds the memory limit is replaced by a randomized one.

    Args:
        n_rows: number of training rows.
        base: the settings that are not searched.

    Raises:
        ServiceError: the space is empty.
    """
    kept: list[ProjectionKind] = []
    lowest_eps = _lowest_eps(n_features, n_rows)
    for projection in projections:
        wanted = projection
        if wanted == "pca":
            try:
                check_pca_memory(n_features)
            except ModelError:
                wanted = "randomized_pca"
        if wanted == "random" and lowest_eps is None:
            continue
        if wanted not in kept:
            kept.append(wanted)
    if not kept or not classifiers:
        raise ConfigurationError(
            f"the search space is empty: a random projection does not reduce {n_features:,} features for {n_rows:,} "
            "rows; allow another projection"
        )
    return Space(tuple(kept), tuple(classifiers), lowest_eps or MAX_EPS, base)


def command_of(options: FitOptions, command: Sequence[str], *, every: bool = False) -> list[str]:
    """Return `command` with flags for the settings.

    Args:
        every: include settings at their default, for a command whose defaults are the champion's settings.
    """
    words = list(command)
    for field in fields(FitOptions):
        value = getattr(options, field.name)
        if value is not None and (every or value != field.default):
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            words += [FLAGS.get(field.name, f"--{field.name.replace('_', '-')}"), text]
    return words


def describe(options: FitOptions) -> str:
    """Return a short description of the searched settings."""
    projection = {
        "pca": f"pca {options.explained_variance:g}",
        "randomized_pca": f"randomized_pca {options.n_components}",
        "random": f"random eps {options.eps:g}",
        "none": "none",
    }[options.projection]
    if options.classifier == "mlp":
        return f"{projection} · mlp {','.join(map(str, options.layers))} iterations {options.max_iter}"
    return f"{projection} · logistic reg {options.reg_param:g} elastic net {options.elastic_net:g}"


def options_from_record(record: dict[str, Any]) -> FitOptions:
    """Return the options from the result of `FitOptions.as_record`."""
    layers = tuple(int(width) for width in str(record["layers"]).split(",") if width)
    return FitOptions(**{**record, "layers": layers})


def _lowest_eps(n_features: int, n_rows: int) -> float | None:
    """Return the smallest eps, to two digits, whose projection is narrower than the features; None if there is none."""
    steps = range(5, int(100 * MAX_EPS))
    fitting = (step / 100 for step in steps if johnson_lindenstrauss_dim(max(2, n_rows), step / 100) < n_features)
    return next(fitting, None)


def _rounded(value: float) -> float:
    return round(value, DIGITS - 1 - floor(log10(abs(value)))) if value else value
