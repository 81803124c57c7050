"""The fitting options of `train`, `retrain` and `train-cnn`, declared once with the types and defaults of `FitOptions`.

`retrain` has no defaults: options that are not given are those of the champion.
"""

import inspect
from collections.abc import Callable
from copy import copy
from dataclasses import fields
from functools import wraps
from typing import Annotated, Any, Optional, get_type_hints

import typer

from streaming.cli.app import usage_errors
from streaming.training.fit_options import NO_THRESHOLD, FitOptions

PANEL = "Fitting"
PANEL_INHERITED = "Fitting (default: the champion's options)"


def _widths(text: Any) -> tuple[int, ...]:
    """Parse widths such as `128,64`; an empty text has none."""
    if isinstance(text, tuple):  # the default
        return text
    try:
        return tuple(int(width) for width in text.split(",") if width.strip())
    except ValueError:
        raise typer.BadParameter(f"expected widths such as 128,64, got {text!r}") from None


METRIC: Any = typer.Option(
    metavar="accuracy|cost[:FP:FN]|f1|macro_f1|log_loss",
    help="Metric by which the gate compares a candidate with the champion; default: the one that --threshold "
    "optimises, else the champion's, else accuracy.",
)
OPTIONS: dict[str, Any] = {
    "projection": typer.Option(help="Dimensionality reduction applied to the features before the classifier."),
    "explained_variance": typer.Option(
        help="Fraction of the variance, from 0 to 1, that PCA's components must explain."
    ),
    "n_components": typer.Option(
        "--components",
        help="Number of components of PCA or a random projection; overrides --explained-variance and --eps.",
    ),
    "eps": typer.Option(help="Maximum relative distortion of squared distances by a random projection."),
    "classifier": typer.Option(help="Classifier that is fitted on the projected features."),
    "layers": typer.Option(parser=_widths, metavar="N,N,…", help="Widths of the MLP's hidden layers."),
    "max_iter": typer.Option(help="Maximum number of iterations of the classifier."),
    "reg_param": typer.Option("--reg", help="Regularisation strength of logistic regression."),
    "elastic_net": typer.Option(help="Elastic-net mixing parameter, from 0 (ridge, L2) to 1 (lasso, L1)."),
    "block_size": typer.Option(help="Number of rows per matrix multiplication of the MLP.", hidden=True),
    "threshold": typer.Option(
        metavar="P|f1|cost:FP:FN|none",
        help="Decision threshold for two classes: the probability from which the second class is predicted, or the "
        "value that is best for its F1 or for the costs of false positives and false negatives.",
    ),
    "metric": METRIC,
    "holdout": typer.Option(help="Fraction of the images, from 0 to 1, held out for evaluation."),
    "group_by": typer.Option(
        metavar="source|key|none|REGEX",
        help="Grouping of the split: images with the same source, the same key, or the same match of a pattern in the "
        "source stay on one side; default: as for the champion.",
    ),
    "seed": typer.Option(help="Random seed, which also determines the held-out images; keep it when retraining."),
}


def with_fit_options(command: Callable[..., None]) -> Callable[..., None]:
    """Replace a command's parameter `options` by an option for every field of `FitOptions`."""

    @wraps(command)
    def with_options(*arguments: Any, **values: Any) -> None:
        given = {name: values.pop(name) for name in OPTIONS}
        if given["threshold"] == NO_THRESHOLD:
            given["threshold"] = None
        with usage_errors():
            options = FitOptions(**given)
        command(*arguments, options=options, **values)

    return _with_parameters(with_options, command, "options", inherited=False)


def with_inherited_options(command: Callable[..., None]) -> Callable[..., None]:
    """Replace a command's parameter `given` by the same options without defaults; it receives those that were given."""

    @wraps(command)
    def with_options(*arguments: Any, **values: Any) -> None:
        given = {name: value for name in OPTIONS if (value := values.pop(name)) is not None}
        command(*arguments, given=given, **values)

    return _with_parameters(with_options, command, "given", inherited=True)


def _with_parameters(
    with_options: Callable[..., None], command: Callable[..., None], replaced: str, *, inherited: bool
) -> Callable[..., None]:
    """Give `with_options` the signature of `command` with the parameter `replaced` expanded to the fitting options."""
    own = inspect.signature(command)
    parameters = [one for one in own.parameters.values() if one.name != replaced]
    hints = get_type_hints(FitOptions)
    for field in fields(FitOptions):
        option = copy(OPTIONS[field.name])
        option.rich_help_panel = PANEL_INHERITED if inherited else PANEL
        kind = tuple if field.name == "layers" else hints[field.name]
        parameter = inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None if inherited else field.default,
            annotation=Annotated[Optional[kind] if inherited else kind, option],  # noqa: UP045  kind is a value
        )
        parameters.append(parameter)
    with_options.__signature__ = own.replace(  # type: ignore[attr-defined]  # what Typer reads
        parameters=[*(one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in parameters)]
    )
    return with_options
