"""The features used by `tune`: stored ones, or computed for each input size and precision."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

import numpy as np
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F  # noqa: N812  as Spark's own documentation writes it

from models.arrays import Features
from models.backbone import Precision
from models.bloom_filter import BloomFilter, FittedOn
from models.bundle import GOLDEN, Bundle
from models.decode import Resize
from models.recipe import Recipe
from models.scorer import Engine, Head, decode_all, golden_images, load_engine, load_scorer
from streaming.errors import DataError
from streaming.images.dataset import Dataset
from streaming.images.featurize import featurize
from streaming.images.labels import labelled_features
from streaming.images.membership_spark import unseen_by
from streaming.images.split import Sides
from streaming.storage.files import as_matrix
from streaming.storage.tables import Table
from streaming.training.backbones import BackboneOptions, PreparedBackbone, make_backbone
from streaming.training.calibrate import calibration_images
from streaming.training.fit import in_order
from streaming.wording import counted

SAMPLE_IMAGES = 16
SAMPLE_ROWS, SAMPLE_BYTES = 256, 16 * 1024**2
REPEATS = 3


@dataclass(frozen=True)
class Variant:
    """A variant of the features, and its rows on the training side.

    Attributes:
        name: unique name, e.g. `160 int8`.
        input_size, precision: the options with which training computes the same features; None for the backbone's own.
        sha256: SHA-256 of the backbone.
        fit_rows, validation_rows: columns image_id, label, features; persisted.
        n_fit, n_validation: number of these rows.
        fingerprint: hash of the images and labels of both.
        backbone_s: seconds per image on one core, including decoding.
        sample: (N, D) sample of the features, to measure heads with.
        guessed: inferred properties of a backbone from a file, one line each.
    """

    name: str
    input_size: int | None
    precision: Precision
    sha256: str
    n_features: int
    classes: tuple[str, ...]
    fit_rows: DataFrame
    validation_rows: DataFrame
    n_fit: int
    n_validation: int
    fingerprint: str
    backbone_s: float
    sample: Features
    guessed: tuple[str, ...] = ()

    def images_per_s(self, head: Head) -> float:
        """Measure the throughput on one core with this head, in images per second."""
        seconds = _fastest(lambda: head.probabilities(self.sample)) / len(self.sample)
        return 1 / (self.backbone_s + seconds)


def stored_variant(
    spark: SparkSession, features: Table, champion: Bundle, sides: Sides, trained_on: BloomFilter | None = None
) -> Variant:
    """Return the champion's stored features; only the golden images of its bundle are read.

    Args:
        trained_on: images on which the backbone was trained, which are excluded from validation.

    Raises:
        ServiceError: there are too few labelled features or fewer than two classes.
    """
    entry = champion.manifest.backbone
    labelled = labelled_features(spark, features, champion.backbone_sha256, group_by=sides.holdout.group_by)
    rows = in_order(labelled, entry.n_features).persist()
    scorer = load_scorer(champion)
    seconds = _seconds_per_image(scorer.engine, golden_images(champion.arrays(GOLDEN)), scorer.fitting)
    made = _MeasuredBackbone(
        None, entry.precision, champion.backbone_sha256, entry.n_features, entry.input_size, seconds
    )
    return _variant(made, rows, sides, trained_on)


@dataclass(frozen=True)
class VariantMaker:
    """Computes the features of a data set for each input size and precision."""

    spark: SparkSession
    features: Table
    dataset: Dataset
    backbone: BackboneOptions
    cache_dir: Path
    sides: Sides
    on_step: Callable[[str], None]

    def make(self, sizes: Sequence[int | None], precisions: Sequence[Precision]) -> list[Variant]:
        """Return a variant for each combination, restricted to images that all of them have features of."""
        made: list[tuple[_MeasuredBackbone, DataFrame]] = []
        for size in sizes:
            exact, rows = self._featurized(size, None)
            if "float32" in precisions:
                made.append((exact, rows))
            if "int8" in precisions:  # calibrated on images that are not held out
                pixels = calibration_images(self.dataset, self.sides.holdout, rows, exact.pixels)
                made.append(self._featurized(size, pixels))
        if len(made) > 1:
            ids = reduce(DataFrame.intersect, [rows.select("image_id") for _, rows in made]).persist()
            made = [(one, rows.join(F.broadcast(ids), "image_id", "left_semi")) for one, rows in made]
        return [_variant(one, rows, self.sides) for one, rows in made]

    def _featurized(self, size: int | None, calibration: "np.ndarray | None") -> "tuple[_MeasuredBackbone, DataFrame]":
        options = self.backbone if size is None else replace(self.backbone, input_size=size)
        with TemporaryDirectory(prefix="imagestream-") as scratch:
            made = make_backbone(options, self.cache_dir, Path(scratch), self.on_step, calibration)
            entry = made.source.entry
            height, width = entry.input_size
            precision = "" if calibration is None else " in int8"
            self.on_step(
                f"computing the features of {counted(self.dataset.n_images, 'image')} with {entry.name} "
                f"at {height}×{width}{precision}"
            )
            found = featurize(self.spark, self.dataset, made.source, self.features, find_duplicates=False)
            if not found.rows:
                path, why = next(iter(found.bad.items()))
                raise DataError(f"none of {counted(self.dataset.n_images, 'image')} can be decoded; {path}: {why}")
            group_by = self.sides.holdout.group_by
            labelled = labelled_features(self.spark, self.features, made.source.sha256, group_by=group_by)
            rows = in_order(labelled, entry.n_features).persist()
            return self._timed(made, size), rows

    def _timed(self, made: PreparedBackbone, size: int | None) -> "_MeasuredBackbone":
        images = [
            data for data, _ in zip(self.dataset.sample_images(SAMPLE_IMAGES), range(SAMPLE_IMAGES), strict=False)
        ]
        entry = made.source.entry
        engine = load_engine(entry, made.source.file.read_bytes())
        seconds = _seconds_per_image(engine, images, entry.fitting)
        facts = (size, entry.precision, made.source.sha256, entry.n_features, entry.input_size, seconds)
        return _MeasuredBackbone(*facts, made.guessed)


@dataclass(frozen=True)
class _MeasuredBackbone:
    """A backbone and its measured speed."""

    input_size: int | None
    precision: Precision
    sha256: str
    n_features: int
    pixels: tuple[int, int]
    seconds: float  # per image
    guessed: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return "×".join(map(str, dict.fromkeys(self.pixels))) + f" {self.precision}"


def _variant(made: _MeasuredBackbone, rows: DataFrame, sides: Sides, trained_on: BloomFilter | None = None) -> Variant:
    fit_rows, validation_rows = sides.training(rows)
    if trained_on is not None:
        validation_rows = unseen_by(validation_rows, FittedOn(trained_on))
    classes = tuple(sorted(row.label for row in fit_rows.select("label").distinct().collect()))
    if len(classes) < 2:  # noqa: PLR2004
        raise DataError(f"tuning needs images of at least two classes, got {list(classes)}")
    counted = F.count(F.lit(1)), F.bit_xor(F.xxhash64("image_id", "label"))
    n_fit, mixed = fit_rows.agg(*counted).collect()[0]
    n_validation, mixed_too = validation_rows.agg(*counted).collect()[0]
    if not n_validation:
        why = "" if trained_on is None else " on which the backbone was not trained"
        raise DataError(f"there are too few images ({n_fit}) for a validation set{why}: label more images")
    some = max(1, min(SAMPLE_ROWS, SAMPLE_BYTES // (4 * made.n_features)))
    sample = as_matrix(validation_rows.select("features").limit(some).toArrow().column(0).combine_chunks())
    return Variant(
        name=made.name,
        input_size=made.input_size,
        precision=made.precision,
        sha256=made.sha256,
        n_features=made.n_features,
        classes=classes,
        fit_rows=fit_rows,
        validation_rows=validation_rows,
        n_fit=n_fit,
        n_validation=n_validation,
        fingerprint=f"{n_fit}:{mixed} {n_validation}:{mixed_too}",
        backbone_s=made.seconds,
        sample=sample,
        guessed=made.guessed,
    )


def _seconds_per_image(engine: Engine, images: Sequence[bytes], fitting: Resize | Recipe) -> float:
    decoded = decode_all(images, engine.input_size, fitting)
    if not decoded.rows:
        raise DataError("no image to measure the backbone with can be decoded")
    return _fastest(lambda: engine(decode_all(images, engine.input_size, fitting).images)) / len(decoded.rows)


def _fastest(call: Callable[[], object]) -> float:
    """Return the seconds of the fastest of a few calls, the least disturbed by other processes."""

    def timed() -> float:
        clock = perf_counter()
        call()
        return perf_counter() - clock

    return min(timed() for _ in range(REPEATS))
