"""`imagestream train` and `imagestream retrain`: the batch jobs that make model versions."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from streaming.cli.app import JsonOption, app, err, out, settings_of, write_json
from streaming.errors import ServiceError

if TYPE_CHECKING:
    from streaming.train import TrainResult


class Dataset(StrEnum):
    """Data sets that come with an installed package."""

    DIGITS = "digits"


VarianceOption = Annotated[
    float, typer.Option(min=0.01, max=1.0, help="Keep as many principal components as explain this share of variance.")
]
HoldoutOption = Annotated[float, typer.Option(min=0.01, max=0.9, help="Share of images that no model is fitted on.")]
RegOption = Annotated[float, typer.Option(min=0.0, help="Strength of the regularisation.")]
ElasticNetOption = Annotated[float, typer.Option(min=0.0, max=1.0, help="0 is ridge, 1 is lasso.")]
IterationsOption = Annotated[int, typer.Option(min=1, help="At most so many iterations of logistic regression.")]
SeedOption = Annotated[int, typer.Option(help="Decides which images are held out; keep it when retraining.")]


@app.command()
def train(
    context: typer.Context,
    images: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A folder with one folder of images per class.")
    ] = None,
    dataset: Annotated[Dataset | None, typer.Option(help="A small data set that is already installed.")] = None,
    limit: Annotated[int, typer.Option(min=2, help="How many images of --dataset to take.")] = 1_000,
    backbone: Annotated[str, typer.Option(help="The CNN that turns an image into features.")] = "efficientnet_lite0",
    weights: Annotated[str, typer.Option(help="imagenet, random, or a weights file that Keras saved.")] = "imagenet",
    explained_variance: VarianceOption = 0.90,
    holdout: HoldoutOption = 0.2,
    reg: RegOption = 0.03,
    elastic_net: ElasticNetOption = 0.0,
    max_iter: IterationsOption = 100,
    seed: SeedOption = 42,
    json_file: JsonOption = None,
) -> None:
    """Train a model on labelled images and register it; the first one becomes the champion.

    Example: imagestream train --images photos/ (one folder per class), or: imagestream train --dataset digits
    """
    from streaming.dataset import digit_images, list_images, write_images

    settings = settings_of(context)
    if (images is None) == (dataset is None):
        raise ServiceError("give either --images DIR or --dataset digits")
    if images is None:
        images = write_images(settings.home / "datasets" / f"digits-{limit}", digit_images(limit))
    files = list_images(images)

    from streaming.fit import FitOptions  # takes a second, which a mistake above need not wait for
    from streaming.train import train as run

    options = FitOptions(explained_variance, holdout, max_iter, reg, elastic_net, seed)
    with err.status(f"training on {len(files):,} files …"):
        result = run(settings, files, backbone, weights, options)
    for path, why in result.bad.items():
        err.print(f"left out {path}: {why}", style="yellow", markup=False, highlight=False)
    _tell(result, json_file)


@app.command()
def retrain(
    context: typer.Context,
    explained_variance: VarianceOption = 0.90,
    holdout: HoldoutOption = 0.2,
    reg: RegOption = 0.03,
    elastic_net: ElasticNetOption = 0.0,
    max_iter: IterationsOption = 100,
    seed: SeedOption = 42,
    json_file: JsonOption = None,
) -> None:
    """Fit a new version on all labelled features stored so far; promote it if it does at least as well.

    A running stream takes up the new champion at its next micro-batch.

    Example: imagestream retrain
    """
    from streaming.fit import FitOptions
    from streaming.train import retrain as run

    options = FitOptions(explained_variance, holdout, max_iter, reg, elastic_net, seed)
    with err.status("retraining …"):
        result = run(settings_of(context), options)
    _tell(result, json_file)


def summary_of(result: "TrainResult") -> dict[str, Any]:
    """The machine-readable summary of a training."""
    return {
        "version": result.version,
        "promoted": result.promoted,
        "why": result.why,
        "training_rows": result.training_rows,
        "left_out": len(result.bad),
        "n_components": result.n_components,
        "variance_kept": result.variance_kept,
        "metrics": result.evaluation.as_metrics(),
        "champion_metrics": result.champion.as_metrics() if result.champion else None,
    }


def _tell(result: "TrainResult", json_file: Path | None) -> None:
    found = result.evaluation
    out.print(
        f"version {result.version}: {result.training_rows:,} images, {result.n_components} components"
        + (f" ({result.variance_kept:.1%} of the variance)" if result.variance_kept else "")
        + f", accuracy {found.accuracy:.4f}, macro F1 {found.macro_f1:.4f}, log loss {found.log_loss:.4f}"
        f" on {found.rows:,} held-out images",
        highlight=False,
    )
    verdict = "champion" if result.promoted else "not promoted"
    out.print(f"version {result.version} is {verdict}: {result.why}", highlight=False)
    write_json(json_file, summary_of(result))
