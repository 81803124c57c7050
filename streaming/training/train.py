"""Training and retraining: two batch jobs over the same fit, beside the stream and never inside it.

`train` featurizes labelled images into the table `features` and fits on them. `retrain` fits on all that the table
holds: the first training set, and what the stream has stored, with the labels that came with the messages or were given
since. Both hold out the same images, so a candidate and the champion are compared on rows that neither was fitted on,
and the gate (`streaming.training.gate`) decides from their answers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from pyspark.sql import DataFrame, SparkSession

from models.architectures import DEFAULT_BACKBONE, Output
from models.backbone import FLATBUFFER_FILE, WEIGHTS_FILE, ExportedBackbone, export_backbone, find_backbone
from models.bundle import GOLDEN, BackboneEntry, Bundle, EngineName
from models.decode import BadImage, decode
from models.projection import check_pca_memory
from models.registry import CHAMPION, Registry
from models.scorer import golden_images
from streaming.errors import ServiceError
from streaming.home import make_dir
from streaming.images.dataset import Dataset
from streaming.images.featurize import Featurized, featurize
from streaming.images.labels import labelled_features
from streaming.platform.java import find_java
from streaming.platform.session import spark_session
from streaming.settings import Settings
from streaming.tables import Table
from streaming.training.calibrate import calibration_images
from streaming.training.candidate import BackboneParts, Candidate, Comparison, compare, make_candidate, register
from streaming.training.evaluate import Evaluation
from streaming.training.fit import in_order, variance_kept
from streaming.training.fit_options import FitOptions, GateOptions
from streaming.training.gate import Verdict, decide, refuse_costly_int8
from streaming.training.tracking import check_tracking, track_run

GOLDEN_IMAGES = 4
OnStep = Callable[[str], None]


@dataclass(frozen=True)
class BackboneOptions:
    """Which network makes the features.

    Attributes:
        weights: `imagenet`, `random`, or a file.
        input_size: height and width of the images; None for the backbone's own.
        engine: what runs it when the model answers.
        int8: as 8-bit integers, calibrated on training images.
    """

    name: str = DEFAULT_BACKBONE
    weights: str = "imagenet"
    output: Output = "pooled"
    input_size: int | None = None
    engine: EngineName = "litert"
    int8: bool = False

    def __post_init__(self) -> None:
        if self.int8 and self.engine == "keras":
            raise ServiceError("8-bit integers are for the engine litert; keras computes in float32")

    @property
    def size(self) -> tuple[int, int] | None:
        return None if self.input_size is None else (self.input_size, self.input_size)


@dataclass(frozen=True)
class TrainResult:
    """What was found about a new model, and what became of it.

    Attributes:
        version: None after a dry run.
        promoted: whether it is the champion now; after a dry run, whether it would be.
        champion: the champion of before, on the images of the holdout that both have features for.
        n_components: what the projection gives the classifier.
        metrics: as the manifest keeps them.
    """

    version: int | None
    sha256: str | None
    promoted: bool
    why: str
    verdict: Verdict
    evaluation: Evaluation
    metrics: dict[str, float]
    champion: Evaluation | None
    training_rows: int
    fingerprint: str
    n_components: int
    variance_kept: float | None
    bad: dict[str, str]  # image → why it was left out, of the first ones
    n_bad: int
    warnings: list[str]


def train(
    settings: Settings,
    dataset: Dataset,
    backbone: BackboneOptions,
    options: FitOptions,
    gate: GateOptions,
    *,
    augment: int = 0,
    on_step: OnStep = lambda _: None,
    by: str = "train",
) -> TrainResult:
    """Featurize images, fit, evaluate, register; the champion when it is the first, else by the gate.

    Args:
        augment: how many altered copies of each training image to fit on, too.

    Raises:
        ServiceError: no image decodes, or fewer than two classes.
        ModelError: an unknown backbone, or weights that cannot be had.
    """
    check_tracking(settings.mlflow_tracking_uri)
    make_dir(settings.home)
    find_java(settings.home)  # before the minute that an export can take
    spec = find_backbone(backbone.name, backbone.output, backbone.size)
    if options.projection == "pca":
        check_pca_memory(spec.n_features)
    export = partial(export_backbone, backbone.name, backbone.weights, settings.backbones_dir, output=spec.output)
    on_step(f"preparing {backbone.name}")
    exported = export(input_size=spec.input_size)
    registry = Registry(settings.models_dir)
    champion = _champion(registry)
    golden = _some_images(dataset, spec.input_size)
    with spark_session(settings, "imagestream train") as spark:
        job = _Job(settings, spark, registry, champion, options, gate, on_step, by, augment)
        rows, read = job.featurized(dataset, exported)
        float_accuracy = None
        if backbone.int8:
            exact = make_candidate(rows, options, champion)
            pixels = calibration_images(dataset, exact.split, rows, spec.input_size)
            on_step(f"preparing {backbone.name} in 8-bit integers")
            exported = export(input_size=spec.input_size, int8_calibration=pixels)
            rows.unpersist()
            rows, read = job.featurized(dataset, exported)
            float_accuracy = exact.evaluation.accuracy
        parts = BackboneParts(
            BackboneEntry.of(exported, engine=backbone.engine),
            files={FLATBUFFER_FILE: exported.flatbuffer, WEIGHTS_FILE: exported.keras_weights},
            golden=golden,
        )
        return job.finish(rows, parts, exported.sha256, read, float_accuracy=float_accuracy)


def retrain(
    settings: Settings,
    options: FitOptions,
    gate: GateOptions,
    *,
    dry_run: bool = False,
    augmented: bool = False,
    on_step: OnStep = lambda _: None,
    by: str = "retrain",
) -> TrainResult:
    """Fit a new version on all labelled features there are, with the champion's backbone; promote it by the gate.

    No image is read and no feature computed again. With `dry_run` nothing is registered and nothing promoted, with
    `augmented` it is fitted on the altered copies that a training has stored, too.

    Raises:
        ServiceError: there is no champion, or no labelled features.
    """
    check_tracking(settings.mlflow_tracking_uri)
    registry = Registry(settings.models_dir)
    current = registry.target(CHAMPION)
    if current is None:
        raise ServiceError(f"there is no champion model in {registry.root} to retrain; run 'imagestream train' first")
    champion = registry.read(current)
    parts = BackboneParts(
        champion.manifest.backbone,
        files={name: registry.path(current) / name for name in (FLATBUFFER_FILE, WEIGHTS_FILE)},
        golden=golden_images(champion.arrays(GOLDEN)),
    )
    with spark_session(settings, "imagestream retrain") as spark:
        job = _Job(settings, spark, registry, champion, options, gate, on_step, by, int(augmented))
        rows = job.stored(champion.backbone_sha256, parts.entry.n_features)
        return job.finish(rows, parts, champion.backbone_sha256, None, dry_run=dry_run)


@dataclass(frozen=True)
class _Job:
    """What the steps of one training share."""

    settings: Settings
    spark: SparkSession
    registry: Registry
    champion: Bundle | None
    options: FitOptions
    gate: GateOptions
    on_step: OnStep
    by: str
    augment: int

    @property
    def features(self) -> Table:
        return Table(self.settings.tables_dir, "features")

    def featurized(self, dataset: Dataset, exported: ExportedBackbone) -> tuple[DataFrame, Featurized]:
        """Every labelled row of the backbone, those of the data set now among them; and the images that are bad."""
        self.on_step(f"computing the features of {dataset.n_images:,} images")
        found = featurize(self.spark, dataset, exported, self.features, augment=self.augment)
        if not found.rows:
            path, why = next(iter(found.bad.items()))
            raise ServiceError(f"not one of the {dataset.n_images:,} files is an image that decodes; {path}: {why}")
        return self.stored(exported.sha256, exported.spec.n_features), found

    def stored(self, backbone_sha256: str, n_features: int) -> DataFrame:
        """The labelled rows of a backbone, in an order of their own, persisted."""
        rows = labelled_features(self.spark, self.features, backbone_sha256, augmented=self.augment > 0)
        return in_order(rows, n_features).persist()

    def finish(
        self,
        rows: DataFrame,
        parts: BackboneParts,
        backbone_sha256: str,
        read: Featurized | None,
        *,
        float_accuracy: float | None = None,
        dry_run: bool = False,
    ) -> TrainResult:
        """Fit, evaluate, compare, register and promote."""
        self.on_step("fitting and evaluating")
        candidate = make_candidate(rows, self.options, self.champion)
        comparison = self._compared(candidate, rows, backbone_sha256)
        cost = None if float_accuracy is None else float_accuracy - candidate.evaluation.accuracy
        verdict = self._verdict(comparison, cost)
        more = {} if cost is None or float_accuracy is None else {"float_accuracy": float_accuracy, "int8_cost": cost}
        version = sha256 = None
        if not dry_run:
            version, sha256 = register(self.registry, candidate, parts, more)
            verdict = self._promoted(version, verdict, candidate)
        rows.unpersist()
        fitted = candidate.fitted
        result = TrainResult(
            version=version,
            sha256=sha256,
            promoted=verdict.promote,
            why=verdict.why,
            verdict=verdict,
            evaluation=candidate.evaluation,
            metrics=candidate.metrics() | more,
            champion=comparison.champion if comparison else None,
            training_rows=fitted.rows,
            fingerprint=fitted.fingerprint,
            n_components=fitted.head.projection.n_out,
            variance_kept=variance_kept(fitted.head.projection),
            bad=read.bad if read else {},
            n_bad=read.n_bad if read else 0,
            warnings=read.warnings() if read else [],
        )
        if not dry_run:
            self._track(result, parts.entry)
        return result

    def _track(self, result: TrainResult, backbone: BackboneEntry) -> None:
        """Tell MLflow of it, if the settings name a server."""
        uri = self.settings.mlflow_tracking_uri
        if uri is None:
            return
        verdict = {"promoted": result.promoted, "why": result.why, "fingerprint": result.fingerprint}
        track_run(
            uri,
            f"{self.by}: version {result.version}",
            parameters=self.options.as_record() | backbone.model_dump() | {"training_rows": result.training_rows},
            metrics=result.metrics,
            tags={"version": result.version, "bundle_sha256": result.sha256, "by": self.by} | verdict,
        )

    def _compared(self, candidate: Candidate, rows: DataFrame, backbone_sha256: str) -> Comparison | None:
        """The champion on the same images, from its own backbone's features if that is another; None without one."""
        if self.champion is None:
            return None
        self.on_step("comparing with the champion")
        sha256 = self.champion.backbone_sha256
        same = sha256 == backbone_sha256 and not self.augment
        theirs = rows if same else labelled_features(self.spark, self.features, sha256)
        return compare(candidate, self.champion, theirs)

    def _verdict(self, comparison: Comparison | None, int8_cost: float | None) -> Verdict:
        first = Verdict(True, "the first model")
        verdict = decide(comparison.counts, self.gate, self.options.seed) if comparison else first
        return refuse_costly_int8(verdict, int8_cost)

    def _promoted(self, version: int, verdict: Verdict, candidate: Candidate) -> Verdict:
        """Move the alias if the verdict says so."""
        if version == self.registry.target(CHAMPION):
            return Verdict(False, "nothing has changed: it is the champion's very model", verdict.counts, verdict.low)
        if verdict.promote:
            self.registry.promote(version, by=self.by, why=verdict.why, metrics=candidate.metrics())
        return verdict


def _champion(registry: Registry) -> Bundle | None:
    current = registry.target(CHAMPION)
    return registry.read(current) if current else None


def _some_images(dataset: Dataset, size: tuple[int, int]) -> list[bytes]:
    """A few images that decode, spread over the data set, to keep in the bundle as golden ones."""
    images: list[bytes] = []
    for data in dataset.some_images(GOLDEN_IMAGES):
        if data not in images and not isinstance(decode(data, size), BadImage):
            images.append(data)
        if len(images) == GOLDEN_IMAGES:
            break
    return images
