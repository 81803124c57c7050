"""The options of fitting, for every command that fits: declared once, with the defaults and types of `FitOptions`.

`train` shows those defaults. `retrain` has none of its own: what is not given is the champion's.
"""

import inspect
from collections.abc import Callable
from copy import copy
from dataclasses import fields
from functools import wraps
from typing import Annotated, Any, Optional, get_type_hints

import typer

from streaming.cli.app import wrong_usage
from streaming.training.fit_options import NO_THRESHOLD, FitOptions

PANEL = "Fitting"
PANEL_INHERITED = "Fitting: as the champion was fitted, unless given"


def _widths(text: Any) -> tuple[int, ...]:
    """The widths in `128,64`; none in an empty text."""
    if isinstance(text, tuple):  # the default
        return text
    try:
        return tuple(int(width) for width in text.split(",") if width.strip())
    except ValueError:
        raise typer.BadParameter(f"expected widths such as 128,64, got {text!r}") from None


METRIC: Any = typer.Option(
    metavar="accuracy|cost[:FP:FN]|f1|macro_f1|log_loss",
    help="What the model is run for, by which the gate compares it with the champion; without it, what --threshold "
    "optimises, else what the champion is run for, else accuracy.",
)
OPTIONS: dict[str, Any] = {
    "projection": typer.Option(help="How features are made narrower before the classifier."),
    "explained_variance": typer.Option(help="PCA keeps as many components as explain this share of the variance."),
    "n_components": typer.Option("--components", help="Keep so many instead; also of a random projection."),
    "eps": typer.Option(help="A random projection keeps squared distances within 1 ± EPS."),
    "classifier": typer.Option(help="What is fitted on the projected features."),
    "layers": typer.Option(parser=_widths, metavar="N,N,…", help="Widths of the MLP's hidden layers."),
    "max_iter": typer.Option(help="At most so many iterations of the classifier."),
    "reg_param": typer.Option("--reg", help="Strength of logistic regression's regularisation."),
    "elastic_net": typer.Option(help="0 is ridge, 1 is lasso."),
    "block_size": typer.Option(help="Rows that the MLP multiplies at a time.", hidden=True),
    "threshold": typer.Option(
        metavar="P|f1|cost:FP:FN|none",
        help="Of two classes, answer the second one from this probability on; or from the best one for its F1, or for "
        "what a false positive and a false negative cost.",
    ),
    "metric": METRIC,
    "holdout": typer.Option(help="Share of the images that is held out to judge by, from 0 to 1."),
    "group_by": typer.Option(
        metavar="source|key|none|REGEX",
        help="Keep images of one source, one key, or one group of a pattern over the source on one side of the split; "
        "default: as for the champion.",
    ),
    "seed": typer.Option(help="Decides, among others, which images are held out; keep it when retraining."),
}


def with_fit_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option for every field of `FitOptions`, in the place of its parameter `options`."""

    @wraps(command)
    def with_options(*arguments: Any, **values: Any) -> None:
        given = {name: values.pop(name) for name in OPTIONS}
        if given["threshold"] == NO_THRESHOLD:
            given["threshold"] = None
        with wrong_usage():
            options = FitOptions(**given)
        command(*arguments, options=options, **values)

    return _with_parameters(with_options, command, "options", inherited=False)


def with_inherited_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the same options without defaults, those that were given in the place of its parameter `given`."""

    @wraps(command)
    def with_options(*arguments: Any, **values: Any) -> None:
        given = {name: value for name in OPTIONS if (value := values.pop(name)) is not None}
        command(*arguments, given=given, **values)

    return _with_parameters(with_options, command, "given", inherited=True)


def _with_parameters(
    with_options: Callable[..., None], command: Callable[..., None], replaced: str, *, inherited: bool
) -> Callable[..., None]:
    """`with_options` with the parameters of `command`, of which one is replaced by the options of fitting."""
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
