"""The HTML report on a model version, evaluated on labelled images on which it was not fitted.

The bundle records the images on which it was fitted. Two versions are compared on images on which neither was fitted.
"""

from dataclasses import dataclass

import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F  # noqa: N812  as Spark's own documentation writes it

from models.bundle import Bundle
from models.paired import gain_interval
from models.projection import PCA
from models.scorer import load_head
from streaming.errors import NotFoundError
from streaming.images.images_frame import read_files
from streaming.images.labels import labelled_features
from streaming.images.membership import fitted_on
from streaming.images.membership_spark import seen_by, unseen_by
from streaming.platform.session import QUICK_START, spark_session
from streaming.registry import open_registry
from streaming.reports.plots import GRID, Sample
from streaming.reports.report_content import CONFIDENCE, ModelReport, VersionComparison, lineage_of, sample_of
from streaming.settings import Settings
from streaming.storage.home import Home
from streaming.storage.tables import Table
from streaming.training.evaluate import evaluate, most_confident_mistakes, sample_predictions
from streaming.training.fit import cache_in_batches_of
from streaming.training.gate import pair
from streaming.training.inherit import objective_of

SAMPLES = GRID * GRID
MISTAKES = 12


@dataclass(frozen=True)
class VersionBundle:
    """A registered version with its bundle."""

    number: int
    bundle: Bundle


def read_model_report(settings: Settings, version: int, against: int | None = None) -> ModelReport:
    """Evaluate a version, and compare it with version `against` if there is one.

    Raises:
        ModelError: a version does not exist or its bundle is invalid.
        ServiceError: there are no labelled features of images on which the version was not fitted.
    """
    registry = open_registry(settings.home)
    ours = VersionBundle(version, registry.read(version))
    other = None if against is None else VersionBundle(against, registry.read(against))
    if not settings.place.has_table("features"):
        raise NotFoundError(
            f"there are no stored features in {settings.place.tables} to evaluate version {version} on: "
            "run 'imagestream train' first"
        )
    features = Table(settings.place.tables, "features")
    with spark_session(settings, "imagestream report", java_options=QUICK_START) as spark:
        return model_report(spark, settings.place, features, ours, other)


def model_report(
    spark: SparkSession,
    home: Home,
    features: Table,
    ours: VersionBundle,
    other: VersionBundle | None = None,
    seed: int = 0,
) -> ModelReport:
    """Return the report on `ours`, compared with `other`; errors as for `read_model_report`.

    Args:
        ours: the version.
        other: the version to compare with; None for no comparison.
    """
    bundle, head = ours.bundle, load_head(ours.bundle)
    group_by = bundle.manifest.training_data.group_by
    rows = labelled_features(spark, features, bundle.backbone_sha256, group_by=group_by)
    widths = (one.bundle.manifest.backbone.n_features for one in (ours, other) if one is not None)
    cache_in_batches_of(rows, 4 * max(widths))
    # Including the training images: finding them separately would read and shuffle all features again.
    rows = rows.withColumn("seen", seen_by(fitted_on(bundle, home), rows)).persist()
    holdout = rows.where(~F.col("seen")).drop("seen")
    try:
        evaluation = evaluate(holdout, head)
        if not evaluation.rows:
            raise NotFoundError(
                f"version {ours.number} may have been fitted on every labelled image in {features.place} with features "
                "of its backbone: label images that arrived later"
            )
        fitted = evaluate(rows.where("seen"), head)
        support = dict(zip(fitted.classes, fitted.support.tolist(), strict=True))
        comparison = _compare(spark, home, features, ours, other, holdout) if other else None
        answers = sample_predictions(holdout, head, SAMPLES, seed), most_confident_mistakes(holdout, head, MISTAKES)
    finally:
        rows.unpersist()
    samples, mistakes = _with_images(spark, features, bundle, *answers)
    projection = head.projection
    return ModelReport(
        title=f"Model version {ours.number}",
        about=f"{evaluation.rows:,} labelled images on which version {ours.number} was not fitted",
        evaluation=evaluation,
        balance={
            "for training": [support.get(name, 0) for name in evaluation.classes],
            "held out": evaluation.support.tolist(),
        },
        samples=samples,
        mistakes=mistakes,
        lineage=lineage_of(bundle),
        variance=(projection.explained_variance_ratio, projection.n_out) if isinstance(projection, PCA) else None,
        comparison=comparison,
        fitted=fitted if fitted.rows else None,
        notes=[] if isinstance(projection, PCA) else [f"A projection of kind {projection.kind} has no variance curve."],
    )


def _compare(
    spark: SparkSession, home: Home, features: Table, ours: VersionBundle, other: VersionBundle, holdout: DataFrame
) -> VersionComparison:
    """Compare both versions on our held-out images on which the other was not fitted, if both have features of them."""
    head, their_head = load_head(ours.bundle), load_head(other.bundle)
    rows = unseen_by(holdout, fitted_on(other.bundle, home))
    their_rows = rows
    if other.bundle.backbone_sha256 != ours.bundle.backbone_sha256:
        stored = labelled_features(spark, features, other.bundle.backbone_sha256)
        their_rows = stored.join(rows.select("image_id"), "image_id", "left_semi").persist()
        rows = rows.join(their_rows.select("image_id"), "image_id", "left_semi")
    rows = rows.persist()
    try:
        evaluation = evaluate(rows, head)
        if not evaluation.rows:
            raise NotFoundError(
                f"versions {ours.number} and {other.number} cannot be compared: there is no labelled image with stored "
                "features of both backbones on which neither was fitted"
            )
        paired = pair(head, rows, their_head, their_rows, objective_of(ours.bundle.manifest))
        theirs = evaluate(their_rows, their_head)
    finally:
        rows.unpersist()
        their_rows.unpersist()
    return VersionComparison(other.number, evaluation, theirs, paired, gain_interval(paired.gain, CONFIDENCE))


def _with_images(spark: SparkSession, features: Table, bundle: Bundle, *answers: pa.Table) -> list[list[Sample]]:
    """Convert predictions to samples, with the images that are still available."""
    rows = [table.to_pylist() for table in answers]
    sources = _sources(spark, features, {row["image_id"] for part in rows for row in part})
    resize = bundle.manifest.backbone.resize
    return [[sample_of(row, sources.get(row["image_id"], []), resize) for row in part] for part in rows]


def _sources(spark: SparkSession, features: Table, image_ids: set[str]) -> dict[str, list[str]]:
    """Return up to two sources of each image."""
    if not image_ids:
        return {}
    rows = read_files(spark, features.files()).withColumn("image_id", F.coalesce("content_sha256", "image_id"))
    found = rows.where(F.col("image_id").isin(*image_ids) & F.col("source").isNotNull())
    places = found.groupBy("image_id").agg(F.min("source").alias("first"), F.max("source").alias("last")).collect()
    return {row.image_id: list(dict.fromkeys([row.first, row.last])) for row in places}
