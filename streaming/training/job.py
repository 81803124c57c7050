"""The steps shared by all trainings: compare a candidate, register it, promote it by the gate, and report it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pyspark.sql import DataFrame, SparkSession

from models.backbone import ExportedBackbone
from models.bundle import BackboneEntry, Bundle
from models.decode import BadImage, decode
from models.evaluation import Evaluation
from models.objective import ACCURACY, Objective
from streaming.errors import DataError
from streaming.images.dataset import Dataset
from streaming.images.featurize import FeatureSource, Featurized, featurize
from streaming.images.labels import count_contradictory, labelled_features
from streaming.images.membership import fitted_on
from streaming.registry import CHAMPION, Registry
from streaming.settings import Settings
from streaming.storage.tables import Table
from streaming.training.candidate import BackboneParts, Candidate, ChampionComparison, compare, register
from streaming.training.fit import in_order, variance_kept
from streaming.training.fit_options import GateOptions
from streaming.training.gate import Verdict, decide, looks_at, pair, reject_costly_int8
from streaming.training.tracking import track_run
from streaming.wording import counted

GOLDEN_IMAGES = 4
OnStep = Callable[[str], None]


@dataclass(frozen=True)
class TrainResult:
    """The result of a training.

    Attributes:
        version: version number; None after a dry run.
        sha256: SHA-256 of the bundle; None after a dry run.
        promoted: whether it is (after a dry run: would be) the champion.
        verdict: the decision of the gate.
        evaluation: evaluation on the held-out images.
        metrics: metrics in the manifest.
        champion: evaluation of the previous champion on the held-out images that both have features of.
        training_rows: number of rows fitted on.
        fingerprint: hash of the training images and labels.
        n_components: output width of the projection.
        variance_kept: fraction of the variance explained by a PCA.
        threshold: decision threshold of two classes; None for the more probable class.
        bad: image → why it was skipped, for the first ones.
        n_bad: number of skipped images.
        warnings: warnings, one line each.
        inherited: options inherited from the champion.
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
    bad: dict[str, str]
    n_bad: int
    warnings: list[str]
    objective: Objective
    inherited: Mapping[str, Any]


@dataclass(frozen=True)
class Job:
    """The shared state of the steps of a training.

    Attributes:
        on_step: called with a description of each step.
        by: name recorded in the alias's history.
        augment: number of augmented copies per image.
        inherited: options inherited from the champion.
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

    def featurized(
        self, dataset: Dataset, backbone: FeatureSource | ExportedBackbone, *, find_duplicates: bool = True
    ) -> tuple[DataFrame, Featurized]:
        """Featurize a data set; return all labelled rows of the backbone and the result of the featurization."""
        self.on_step(f"computing the features of {counted(dataset.n_images, 'image')}")
        source = FeatureSource.of(backbone) if isinstance(backbone, ExportedBackbone) else backbone
        found = featurize(
            self.spark,
            dataset,
            source,
            self.features,
            augment=self.augment,
            limits=self.settings.image_limits,
            find_duplicates=find_duplicates,
        )
        if not found.rows:
            path, why = next(iter(found.bad.items()))
            raise DataError(f"none of {counted(dataset.n_images, 'image')} can be decoded; {path}: {why}")
        return self.stored(source.sha256, source.entry.n_features), found

    def stored(self, backbone_sha256: str, n_features: int) -> DataFrame:
        """Return the labelled rows of a backbone in a reproducible order, persisted."""
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
        """Compare, register and promote a candidate.

        Args:
            rows: the rows that it was split from; unpersisted at the end.
            read: the result of the featurization, if images were read.
            exact: the float32 counterpart of a candidate in 8-bit integers.
            dry_run: neither register nor promote.
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
            self._log_to_mlflow(result, candidate, parts.entry)
        return result

    def _left_out(self, backbone_sha256: str) -> list[str]:
        """Return a warning about images that were skipped because of contradictory labels."""
        n = count_contradictory(self.spark, self.features, backbone_sha256)
        if not n:
            return []
        return [f"skipped {counted(n, 'image')} with contradictory labels: set their labels with 'imagestream label'"]

    def _log_to_mlflow(self, result: TrainResult, candidate: Candidate, backbone: BackboneEntry) -> None:
        """Log the training to MLflow, if a server is configured."""
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

    def _compared(self, candidate: Candidate, rows: DataFrame, backbone_sha256: str) -> ChampionComparison | None:
        """Compare with the champion, on its own backbone's features; None if there is no champion."""
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

    def _verdict(self, comparison: ChampionComparison | None, seed: int, int8_cost: float | None) -> Verdict:
        verdict = Verdict(True, "the first model")
        current = self.registry.target(CHAMPION)
        if comparison and current:
            verdict = decide(comparison.paired, self.gate, 1 + looks_at(self.registry, current, seed))
        return reject_costly_int8(verdict, int8_cost)

    def _promoted(self, version: int, verdict: Verdict, candidate: Candidate) -> Verdict:
        """Move the alias if the verdict says so."""
        if version == self.registry.target(CHAMPION):
            return replace(verdict, promote=False, why="the model is identical to the champion")
        if not self.gate.promote:
            return replace(verdict, promote=False, why=f"promotion is disabled (--no-promote); the gate: {verdict.why}")
        if verdict.promote:
            self.registry.promote(version, by=self.by, why=verdict.why, metrics=candidate.metrics())
        return verdict


def int8_metrics(exact: Candidate, candidate: Candidate) -> dict[str, float]:
    """Return the accuracy in float32 and the loss of accuracy by 8-bit integers, on images held out from both."""
    counts = pair(candidate.fitted.head, candidate.holdout, exact.fitted.head, exact.holdout).counts
    float_accuracy = (counts.both + counts.only_champion) / max(1, counts.rows)
    return {"float_accuracy": float_accuracy, "int8_cost": -counts.gain}


def champion_of(registry: Registry) -> Bundle | None:
    """Return the champion's bundle, if there is one."""
    current = registry.target(CHAMPION)
    return registry.read(current) if current else None


def sample_images(dataset: Dataset, size: tuple[int, int]) -> list[bytes]:
    """Return a few decodable images of the data set for golden predictions."""
    images: list[bytes] = []
    for data in dataset.sample_images(GOLDEN_IMAGES):
        if data not in images and not isinstance(decode(data, size), BadImage):
            images.append(data)
        if len(images) == GOLDEN_IMAGES:
            break
    return images
