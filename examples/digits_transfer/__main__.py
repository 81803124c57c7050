"""Transfer learning on a folder per digit: a Spark ML Pipeline, saved and loaded, judged, tuned; a model, a stream.

Example: python -m examples.digits_transfer digits/
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from pyspark.ml import PipelineModel

from examples.digits_transfer.transfer import (
    ELASTIC_NET,
    MAX_ITER,
    REG_PARAM,
    SEED,
    SPLIT,
    classification_report,
    evaluate,
    make_pipeline,
    read_digits,
    sample_predictions,
    tune,
    write_plots,
)
from examples.service import (
    BackboneOption,
    HomeOption,
    JsonOption,
    Outcome,
    PerClassOption,
    Service,
    WeightsOption,
    script,
)
from streaming.images.dataset import digit_images, write_images
from streaming.platform.session import QUICK_START, spark_session

ALL_DIGITS = 5_000  # installed images
ORIGINAL = "F1 .8112, precision .8422, recall .8091, accuracy .8091, ROC AUC .901, InceptionV3 (imagenet)"


def digits(per_class: int) -> Iterator[tuple[str, str, bytes]]:
    """(file name, digit, PNG) of the first `per_class` MNIST images of each digit."""
    seen: Counter[str] = Counter()
    for name, digit, data in digit_images(ALL_DIGITS):
        seen[digit] += 1
        if seen[digit] <= per_class:
            yield name, digit, data


def main(
    images: Annotated[Path | None, typer.Argument(help="Folder with one folder per digit; default: MNIST.")] = None,
    home: HomeOption = None,
    backbone: BackboneOption = "inception_v3",
    weights: WeightsOption = "imagenet",
    input_size: Annotated[
        int | None, typer.Option(help="Input size of the backbone, in pixels per side; default: its own.")
    ] = None,
    per_class: PerClassOption = 50,
    folds: Annotated[int, typer.Option(min=2, help="Number of folds of the cross-validation for tuning.")] = 3,
    json_file: JsonOption = None,
) -> None:
    """Fit, save, load, evaluate and tune a Pipeline of CNN and logistic regression; then score with the stream."""
    service = Service.new("digits_transfer", home)
    images = images or write_images(service.home / "images", digits(per_class))
    saved = str(service.home / "pipeline")

    with spark_session(service.settings, "digits_transfer", java_options=QUICK_START) as spark:
        rows = read_digits(spark, images)
        training, test = rows.randomSplit(SPLIT, seed=SEED)
        fitted = make_pipeline(backbone, weights, input_size, service.settings.backbones_dir).fit(training)
        fitted.write().overwrite().save(saved)
        loaded = PipelineModel.load(saved)
        answers = loaded.transform(test).persist()
        found = evaluate(answers)
        plots = write_plots(found, sample_predictions(answers), service.home)

        featurizer = loaded.stages[0]
        best, mean_f1 = tune(featurizer.transform(training).persist(), folds)
        tuned = evaluate(best.transform(answers.select("label", "features")))
        images_in, fitted_on = rows.count(), training.count()
    typer.echo(classification_report(found))

    settings = {"max-iter": MAX_ITER, "reg": best.getRegParam(), "elastic-net": best.getElasticNetParam()}
    options = [word for name, value in settings.items() for word in (f"--{name}", value)]
    network = ("--backbone", backbone, "--weights", weights, "--projection", "none", "--seed", SEED)
    size = () if input_size is None else ("--input-size", input_size)
    trained = service.run("train", "--images", images, *network, *size, *options)
    scored = service.score(images, "--label-from", "parent")
    Outcome(
        example="digits_transfer",
        rows_in=images_in,
        rows_out=fitted_on + found.rows,
        metric=f"weighted F1 on the test images, {backbone} ({weights}) + logistic regression",
        value=found.weighted(found.f1),
        original=ORIGINAL,
        published=scored.published,
        streamed=scored.predicted,
        plots=plots,
        details={
            "test images": found.rows,
            "precision": found.weighted(found.precision),
            "recall": found.weighted(found.recall),
            "accuracy": found.accuracy,
            "ROC AUC": found.weighted_auc,
            "tuned": settings | {"mean F1 of the folds": mean_f1, "F1 on the test images": tuned.weighted(tuned.f1)},
            "before tuning": {"max-iter": MAX_ITER, "reg": REG_PARAM, "elastic-net": ELASTIC_NET},
            "accuracy of the bundle": trained["metrics"]["accuracy"],
            "pipeline": saved,
        },
    ).print_summary(json_file)


if __name__ == "__main__":
    script(main)
