"""The original as one Spark ML Pipeline of CNN features and logistic regression: fitting, evaluation and tuning."""

from pathlib import Path

import numpy as np
from pyspark.ml import Pipeline
from pyspark.ml.classification import LogisticRegression, LogisticRegressionModel
from pyspark.ml.evaluation import MulticlassClassificationEvaluator
from pyspark.ml.tuning import CrossValidator, CrossValidatorModel, ParamGridBuilder
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F  # noqa: N812  as Spark's own documentation writes it

from models.decode import BadImage, decode
from models.evaluation import Evaluation
from models.evaluation_sums import EvaluationSums
from streaming.ml import DeepImageFeaturizer
from streaming.reports.plots import Sample, confusion_figure, png, roc_figure, samples_figure

MAX_ITER, REG_PARAM, ELASTIC_NET = 5, 0.03, 0.5
SPLIT, SEED = [0.8, 0.2], 42
SAMPLES = 9
MIN_PROBABILITY = 1e-30
SHOWN = (112, 112)  # pixels
DIGITS = tuple(map(str, range(10)))


def read_digits(spark: SparkSession, folder: Path) -> DataFrame:
    """Read rows (path, image: encoded bytes, label: double) from a folder per digit."""
    files = spark.read.format("binaryFile").option("recursiveFileLookup", "true").load(str(folder))
    digit = F.element_at(F.split("path", "/"), -2)
    return files.select("path", F.col("content").alias("image"), digit.cast("double").alias("label"))


def make_pipeline(backbone: str, weights: str, input_size: int | None, cache_dir: Path) -> Pipeline:
    """The Pipeline from images to digits with the original's settings.

    Args:
        input_size: pixels per side; None for the backbone's own size.
    """
    featurizer = DeepImageFeaturizer(
        inputCol="image",
        outputCol="features",
        modelName=backbone,
        weights=weights,
        inputSize=None if input_size is None else [input_size, input_size],
        handleInvalid="skip",
        cacheDir=str(cache_dir),
    )
    classifier = LogisticRegression(maxIter=MAX_ITER, regParam=REG_PARAM, elasticNetParam=ELASTIC_NET)
    return Pipeline(stages=[featurizer, classifier])


def evaluate(answers: DataFrame) -> Evaluation:
    """Evaluate predictions (label, probability), which are streamed through the driver one at a time."""
    sums = EvaluationSums(DIGITS, len(DIGITS))
    for row in answers.select("label", "probability").toLocalIterator():
        logits = np.log(np.maximum(row["probability"].toArray(), MIN_PROBABILITY))
        sums.add(logits[None], np.array([int(row["label"])]))
    return sums.result()


def sample_predictions(answers: DataFrame) -> list[Sample]:
    """Nine predictions (path, image, label, prediction, probability), sampled by the hash of the path."""
    picked = answers.orderBy(F.xxhash64("path", F.lit(SEED))).limit(SAMPLES).collect()
    samples = []
    for row in picked:
        pixels = decode(bytes(row["image"]), SHOWN)
        confidence = float(row["probability"].toArray().max())
        label, predicted = DIGITS[int(row["label"])], DIGITS[int(row["prediction"])]
        shown = None if isinstance(pixels, BadImage) else pixels
        samples.append(Sample(row["path"], label, predicted, confidence, shown, row["path"]))
    return samples


def write_plots(found: Evaluation, samples: list[Sample], folder: Path) -> list[Path]:
    """Write confusion matrix, ROC curves and sampled predictions as PNG files."""
    pictures = {
        "confusion.png": png(lambda: confusion_figure(found)),
        "roc.png": png(lambda: roc_figure(found)),
        "samples.png": png(lambda: samples_figure(samples)),
    }
    for name, content in pictures.items():
        (folder / name).write_bytes(content)
    return [folder / name for name in pictures]


def classification_report(found: Evaluation) -> str:
    """A table of precision, recall and F1 by digit."""
    figures = zip(found.classes, found.precision, found.recall, found.f1, found.support, strict=True)
    lines = [f"  {name:>5} {p:10.4f} {r:10.4f} {f1:10.4f} {n:10,}" for name, p, r, f1, n in figures]
    return "\n".join([f"  digit {'precision':>10} {'recall':>10} {'F1':>10} {'images':>10}", *lines])


def tune(features: DataFrame, folds: int) -> tuple[LogisticRegressionModel, float]:
    """Tune a logistic regression by cross-validation; returns the best model and its mean F1."""
    classifier = LogisticRegression(maxIter=MAX_ITER)
    grid = (
        ParamGridBuilder()
        .addGrid(classifier.regParam, [0.003, REG_PARAM])
        .addGrid(classifier.elasticNetParam, [0.0, ELASTIC_NET])
        .build()
    )
    judge = MulticlassClassificationEvaluator(metricName="f1")
    search = CrossValidator(
        estimator=classifier, estimatorParamMaps=grid, evaluator=judge, numFolds=folds, seed=SEED, parallelism=2
    )
    found: CrossValidatorModel = search.fit(features)
    best = found.bestModel
    assert isinstance(best, LogisticRegressionModel)  # noqa: S101  for mypy
    return best, float(max(found.avgMetrics))
