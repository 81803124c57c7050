"""What every training does with a candidate: compare it, register it, promote it by the gate, and report it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pyspark.sql import DataFrame, SparkSession

from models.backbone import ExportedBackbone
from models.bundle import BackboneEntry, Bundle
from models.decode import BadImage, decode
from models.objective import ACCURACY, Objective
from streaming.errors import DataError
from streaming.images.dataset import Dataset
from streaming.images.exposure import fitted_on
from streaming.images.featurize import FeatureSource, Featurized, featurize
from streaming.images.labels import count_contradictory, labelled_features
from streaming.registry import CHAMPION, Registry
from streaming.settings import Settings
from streaming.storage.tables import Table
from streaming.training.candidate import BackboneParts, Candidate, Comparison, compare, register
from streaming.training.evaluate import Evaluation
from streaming.training.fit import in_order, variance_kept
from streaming.training.fit_options import GateOptions
from streaming.training.gate import Verdict, decide, looks_at, pair, refuse_costly_int8
from streaming.training.tracking import track_run

GOLDEN_IMAGES = 4
OnStep = Callable[[str], None]


@dataclass(frozen=True)
class TrainResult:
    """What was found about a new model, and what became of it.

    Attributes:
        version: None after a dry run.
        promoted: whether it is the champion now; after a dry run, whether it would be.
        champion: the champion of before, on the images of the holdout that both have features for.
        n_components: what the projection gives the classifier.
        threshold: of two classes, the probability from which on the second one is answered; None for the more probable.
        metrics: as the manifest keeps them.
        objective: what the model is run for, by which it was compared.
        inherited: the options that a retraining took over from the champion.
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
    threshold: float | None
    bad: dict[str, str]  # image → why it was left out, of the first ones
    n_bad: int
    warnings: list[str]
    objective: Objective
    inherited: Mapping[str, Any]


@dataclass(frozen=True)
class Job:
    """What the steps of one training share.

    Attributes:
        objective: what the candidate and the champion are compared by.
        inherited: the options that were taken over from the champion.
    """

    settings: Settings
    spark: SparkSession
    registry: Registry
    champion: Bundle | None
    gate: GateOptions
    on_step: OnStep
    by: str
    augment: int = 0
    group_by: str | None = None
    objective: Objective = ACCURACY
    inherited: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.objective.check_margin(self.gate.margin)

    @property
    def features(self) -> Table:
        return Table(self.settings.place.tables, "features")

    def featurized(self, dataset: Dataset, backbone: FeatureSource | ExportedBackbone) -> tuple[DataFrame, Featurized]:
        """Every labelled row of the backbone, those of the data set now among them; and the images that are bad."""
        self.on_step(f"computing the features of {dataset.n_images:,} images")
        source = FeatureSource.of(backbone) if isinstance(backbone, ExportedBackbone) else backbone
        found = featurize(
            self.spark, dataset, source, self.features, augment=self.augment, limits=self.settings.image_limits
        )
        if not found.rows:
            path, why = next(iter(found.bad.items()))
            raise DataError(f"not one of the {dataset.n_images:,} files is an image that decodes; {path}: {why}")
        return self.stored(source.sha256, source.entry.n_features), found

    def stored(self, backbone_sha256: str, n_features: int) -> DataFrame:
        """The labelled rows of a backbone, in an order of their own, persisted."""
        rows = labelled_features(
            self.spark, self.features, backbone_sha256, augmented=self.augment > 0, group_by=self.group_by
        )
        return in_order(rows, n_features).persist()

    def finish(
        self,
        candidate: Candidate,
        rows: DataFrame,
        parts: BackboneParts,
        backbone_sha256: str,
        read: Featurized | None,
        *,
        exact: Candidate | None = None,
        dry_run: bool = False,
    ) -> TrainResult:
        """Compare, register and promote a candidate, and report it.

        Args:
            rows: what it was split from; unpersisted.
            exact: the same in float32, of a candidate in 8-bit integers.
        """
        comparison = self._compared(candidate, rows, backbone_sha256)
        more = {} if exact is None else int8_metrics(exact, candidate)
        verdict = self._verdict(comparison, candidate.split.seed, more.get("int8_cost"))
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
            threshold=fitted.head.threshold,
            bad=read.bad if read else {},
            n_bad=read.n_bad if read else 0,
            warnings=[*(read.warnings() if read else []), *self._left_out(backbone_sha256), *candidate.warnings],
            objective=self.objective,
            inherited=self.inherited,
        )
        if not dry_run:
            self._track(result, candidate, parts.entry)
        return result

    def _left_out(self, backbone_sha256: str) -> list[str]:
        """How many images were not used because nobody knows which of their labels is right."""
        n = count_contradictory(self.spark, self.features, backbone_sha256)
        if not n:
            return []
        return [f"left out {n:,} images whose very bytes come with different labels: give one by 'imagestream label'"]

    def _track(self, result: TrainResult, candidate: Candidate, backbone: BackboneEntry) -> None:
        """Log it to MLflow, if the settings name a server."""
        uri = self.settings.mlflow_tracking_uri
        if uri is None:
            return
        verdict = {"promoted": result.promoted, "why": result.why, "fingerprint": result.fingerprint}
        track_run(
            uri,
            f"{self.by}: version {result.version}",
            parameters={**candidate.record, **backbone.model_dump(), "training_rows": result.training_rows},
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
        theirs = (
            rows if same else labelled_features(self.spark, self.features, sha256, group_by=candidate.split.group_by)
        )
        seen = fitted_on(self.champion, self.settings.place)
        return compare(candidate, self.champion, theirs, seen, self.objective)

    def _verdict(self, comparison: Comparison | None, seed: int, int8_cost: float | None) -> Verdict:
        verdict = Verdict(True, "the first model")
        current = self.registry.target(CHAMPION)
        if comparison and current:
            verdict = decide(comparison.paired, self.gate, 1 + looks_at(self.registry, current, seed))
        return refuse_costly_int8(verdict, int8_cost)

    def _promoted(self, version: int, verdict: Verdict, candidate: Candidate) -> Verdict:
        """Move the alias if the verdict says so."""
        if version == self.registry.target(CHAMPION):
            return replace(verdict, promote=False, why="nothing has changed: it is the champion's very model")
        if not self.gate.promote:
            return replace(verdict, promote=False, why=f"not asked for (--no-promote); the gate: {verdict.why}")
        if verdict.promote:
            self.registry.promote(version, by=self.by, why=verdict.why, metrics=candidate.metrics())
        return verdict


def int8_metrics(exact: Candidate, candidate: Candidate) -> dict[str, float]:
    """What 8-bit integers cost: accuracy on the images that are held out of both, whichever others either has."""
    counts = pair(candidate.fitted.head, candidate.holdout, exact.fitted.head, exact.holdout).counts
    float_accuracy = (counts.both + counts.only_champion) / max(1, counts.rows)
    return {"float_accuracy": float_accuracy, "int8_cost": -counts.gain}


def champion_of(registry: Registry) -> Bundle | None:
    """The champion, if there is one."""
    current = registry.target(CHAMPION)
    return registry.read(current) if current else None


def some_images(dataset: Dataset, size: tuple[int, int]) -> list[bytes]:
    """A few images that decode, spread over the data set, to keep in the bundle as golden ones."""
    images: list[bytes] = []
    for data in dataset.some_images(GOLDEN_IMAGES):
        if data not in images and not isinstance(decode(data, size), BadImage):
            images.append(data)
        if len(images) == GOLDEN_IMAGES:
            break
    return images
