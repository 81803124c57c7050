"""`imagestream tune`: search projection and classifier settings, trading accuracy against throughput."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from models.architectures import DEFAULT_BACKBONE
from streaming.cli.app import JsonOption, app, program, settings_of, write_json
from streaming.cli.backbone_options import BackboneOption, PresetOption, WeightsOption
from streaming.cli.command_line import MODELS, SPARK, Deprecated, seconds
from streaming.cli.console import err, out, progress_bar, text_column, warn
from streaming.cli.dataset_options import (
    DEPRECATED_OUTPUT,
    DatasetOption,
    FlatOption,
    LabelsOption,
    LimitOption,
    PatternOption,
    choose_dataset,
    pooling_of,
)
from streaming.cli.output import print_table
from streaming.errors import UsageError
from streaming.training.fit_options import ClassifierKind, FitOptions, ProjectionKind

if TYPE_CHECKING:
    from streaming.settings import Settings
    from streaming.training.tune import Source, Tuned

DEFAULTS = FitOptions()
SHOWN = 10
DEFAULT_FEATURES = (DEFAULT_BACKBONE, "imagenet", False, None)  # backbone, weights, flat, preset
COLUMNS = "trial features settings components accuracy macro_f1 log_loss images_per_s front"


@app.command(panel=MODELS, settings=SPARK, deprecated=(DEPRECATED_OUTPUT, Deprecated("--engines", "--precisions {}")))
def tune(
    context: typer.Context,
    trials: Annotated[
        int, typer.Option(min=1, help="Total number of trials, including those of earlier runs on the same data.")
    ] = 30,
    timeout: Annotated[
        Any,
        typer.Option(
            parser=seconds,
            metavar="TIME",
            help="Time after which no further trial starts, e.g. 10m; default: no limit.",
        ),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Number of trials run in parallel.")] = 2,
    seed: Annotated[int, typer.Option(help="Random seed of the search and of the split.")] = DEFAULTS.seed,
    holdout: Annotated[
        float, typer.Option(help="Fraction of the images, from 0 to 1, held out from the search.")
    ] = DEFAULTS.holdout,
    validation: Annotated[
        float, typer.Option(help="Fraction of the remaining images, from 0 to 1, used to compare settings.")
    ] = 0.25,
    projections: Annotated[
        str, typer.Option(metavar="NAME,…", help="Projections to try: pca, random, randomized_pca, none.")
    ] = ("pca,random,none"),
    classifiers: Annotated[
        str, typer.Option(metavar="NAME,…", help="Classifiers to try: logistic_regression, mlp.")
    ] = ("logistic_regression,mlp"),
    images: Annotated[
        str | None, typer.Option(metavar="PLACE", help="Images to search on; default: the features stored in the home.")
    ] = None,
    labels: LabelsOption = None,
    label_pattern: PatternOption = None,
    dataset: DatasetOption = None,
    limit: LimitOption = 1_000,
    backbone: BackboneOption = DEFAULT_BACKBONE,
    weights: WeightsOption = "imagenet",
    flat: FlatOption = False,
    preset: PresetOption = None,
    input_sizes: Annotated[
        str | None,
        typer.Option(
            metavar="N,…", help="Input sizes in pixels to compare, e.g. 224,160; features are computed for each."
        ),
    ] = None,
    precisions: Annotated[
        str,
        typer.Option(metavar="NAME,…", help="Precisions to compare: float32, int8; features are computed for each."),
    ] = "float32",
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="File to write the plot of the trade-offs to; default: HOME/tune/trade-offs.png."
        ),
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Search projection and classifier settings on features that are computed once; show accuracy against throughput.

    Settings are compared on a validation part of the training images; held-out images are not used. The study is stored
    in the home: run the command again to continue it. At the end it prints the command that trains with the best
    settings.

    Example: imagestream tune --trials 50, or: imagestream tune --images photos/ --input-sizes 224,160
    """
    from rich.progress import BarColumn, MofNCompleteColumn, TimeElapsedColumn

    settings = settings_of(context)
    kinds = _names("--projections", projections, get_args(ProjectionKind))
    fitted = _names("--classifiers", classifiers, get_args(ClassifierKind))
    chosen = _names("--precisions", precisions, ("float32", "int8"))
    sizes = _sizes(input_sizes)
    network = (backbone, weights, flat, preset)
    if images is None and dataset is None and (network != DEFAULT_FEATURES or sizes or chosen != ("float32",)):
        raise UsageError(
            "--backbone, --weights, --flat, --preset, --input-sizes and --precisions need features that are not "
            "stored: give the images with --images or --dataset"
        )
    if images is not None and dataset is not None:
        raise UsageError("give either --images PLACE or --dataset digits")
    places = {"images": images, "labels": labels, "dataset": dataset}
    given = {"label_pattern": label_pattern, "backbone": backbone, "weights": weights, "flat": flat, "preset": preset}

    from streaming.training.tune import TuneOptions  # slow to import: usage errors above are reported first
    from streaming.training.tune import tune as run

    options = TuneOptions(trials, timeout, jobs, seed, validation, holdout, kinds, fitted)
    source = _source(settings, places | given, limit, sizes, chosen)
    columns = (text_column("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with progress_bar(*columns) as progress:
        bar = progress.add_task("starting", total=trials)
        found = run(
            settings,
            options,
            source,
            on_step=lambda step: progress.update(bar, description=step),
            on_trial=lambda done: progress.update(bar, completed=done),
        )
    command = _command(settings, found, places | given, limit)
    warn(*found.warnings)
    _print_result(found, command)
    picture = plot or settings.work_dir / "tune" / "trade-offs.png"
    from streaming.training.tune_plot import plot_trade_offs

    plot_trade_offs(found, picture)
    out.print(f"trade-offs: {picture}")
    write_json(json_file, summary_of(found) | {"command": command, "plot": str(picture)})


def summary_of(found: "Tuned") -> dict[str, Any]:
    """Return the summary of a search for `--json`."""
    return {
        "best": found.best.as_record(),
        "front": found.front,
        "trials": [one.as_record() for one in sorted(found.outcomes, key=lambda one: one.number)],
        "failed": found.failed,
        "resumed": found.resumed,
        "fit_rows": found.rows[0],
        "validation_rows": found.rows[1],
        "study": str(found.study),
        "warnings": list(found.warnings),
    }


def _print_result(found: "Tuned", command: str) -> None:
    from streaming.training.tune_space import describe

    shown = sorted({one.number for one in found.outcomes[:SHOWN]} | set(found.front))
    rows = [
        {
            "trial": one.number,
            "features": one.variant,
            "settings": describe(one.options),
            "components": one.components,
            "accuracy": one.accuracy,
            "macro_f1": one.macro_f1,
            "log_loss": one.log_loss,
            "images_per_s": round(one.images_per_s),
            "front": "*" if one.number in found.front else "",
        }
        for one in found.outcomes
        if one.number in shown
    ]
    fit_rows, validation_rows = found.rows
    columns = COLUMNS if len(found.variants) > 1 else COLUMNS.replace("features ", "")
    print_table(f"fitted on {fit_rows:,} images, validated on {validation_rows:,} others", rows, columns)
    if found.failed:
        number, why = next(iter(found.failed.items()))
        err.print(f"{len(found.failed)} trials could not be fitted; trial {number}: {why}", style="yellow")
    resumed = f", {found.resumed} of them from earlier runs" if found.resumed else ""
    out.print(f"{len(found.outcomes)} trials{resumed}; * on the Pareto front. The best settings:")
    out.print(f"  {command}")


def _command(settings: "Settings", found: "Tuned", given: dict[str, Any], limit: int) -> str:
    """Return the shell command that trains with the best settings."""
    from streaming.settings import HOME
    from streaming.training.tune_space import command_of

    words = program() if settings.home == str(Path(HOME).absolute()) else [*program(), "--home", settings.home]
    best = found.best
    if given["images"] is None and given["dataset"] is None:
        return shlex.join(command_of(best.options, [*words, "retrain"], every=True))
    words.append("train")
    usual = {"backbone": DEFAULT_BACKBONE, "weights": "imagenet"}
    words += ["--flat"] if given["flat"] else []
    for name, value in given.items():
        if name != "flat" and value is not None and value != usual.get(name):
            words += [f"--{name.replace('_', '-')}", str(value)]
    if given["dataset"] is not None:
        words += ["--limit", str(limit)]
    size = next(one.input_size for one in found.variants if one.name == best.variant)
    precision = next(one.precision for one in found.variants if one.name == best.variant)
    words += ["--input-size", str(size)] if size is not None else []
    words += ["--int8"] if precision == "int8" else []
    return shlex.join(command_of(best.options, words))


def _source(
    settings: "Settings", given: dict[str, Any], limit: int, sizes: tuple[int, ...], precisions: Any
) -> "Source | None":
    from streaming.training.backbones import BackboneOptions
    from streaming.training.tune import Source

    if given["images"] is None and given["dataset"] is None:
        return None
    images, dataset = given["images"], given["dataset"]
    found = choose_dataset(settings, images, dataset, limit, given["label_pattern"], given["labels"])
    backbone = BackboneOptions(given["backbone"], given["weights"], pooling_of(given["flat"]), preset=given["preset"])
    return Source(found, backbone, sizes, precisions)


def _names(option: str, text: str, known: tuple[str, ...]) -> Any:
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names or not set(names) <= set(known):
        raise UsageError(f"{option}: expected names among {', '.join(known)}, separated by commas, got {text!r}")
    return names


def _sizes(text: str | None) -> tuple[int, ...]:
    try:
        return tuple(dict.fromkeys(int(size) for size in text.split(","))) if text else ()
    except ValueError:
        raise UsageError(f"--input-sizes: expected sizes in pixels such as 224,160, got {text!r}") from None
