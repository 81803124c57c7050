"""Hyperparameter search for projection and classifier on features that are computed once.

Optuna proposes a batch of settings, which threads fit with Spark; only models and counts reach the driver. Settings are
compared on validation images of the training side; held-out images, by which the gate decides, are never used. PCA is
computed once for all numbers of components.

The study is a file of JSON lines in the home, named by a hash of the data and the search space: another run on the same
data continues it, even after a crash.
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from models.backbone import Precision
from models.errors import ModelError
from models.projection import PCA, NoProjection, Projection, components_to_keep, fit_pca
from models.random_projection import johnson_lindenstrauss_dim, make_random_projection
from models.scorer import Head
from streaming.errors import NotFoundError, ServiceError, UsageError
from streaming.images.dataset import Dataset
from streaming.images.groups import chosen_groups
from streaming.images.membership import backbone_fitted_on
from streaming.images.split import Sides
from streaming.platform.session import spark_session
from streaming.registry import open_registry
from streaming.settings import Settings
from streaming.storage.home import make_dir, try_lock
from streaming.storage.tables import Table
from streaming.training.accumulators import gram_sums
from streaming.training.backbones import BackboneOptions
from streaming.training.evaluate import evaluate
from streaming.training.fit import MEMORY_FOR_FITTING, fit_classifier, fit_projection
from streaming.training.fit_options import ClassifierKind, FitOptions, ProjectionKind
from streaming.training.job import champion_of
from streaming.training.tune_features import Variant, VariantMaker, stored_variant
from streaming.training.tune_space import Space, make_space
from streaming.training.tune_study import TrialResult, finished, open_study, outcomes_of, record

if TYPE_CHECKING:
    import optuna


@dataclass(frozen=True)
class TuneOptions:
    """Options of a search.

    Attributes:
        trials: total number of trials, including those of earlier runs on the same data.
        timeout_s: time after which no further trial starts; at least one batch runs.
        jobs: number of parallel trials.
        seed: random seed of the search and the split.
        validation: fraction of the training side used to compare settings.
        holdout: fraction of the images that is held out.
    """

    trials: int = 30
    timeout_s: float | None = None
    jobs: int = 2
    seed: int = 42
    validation: float = 0.25
    holdout: float = 0.2
    projections: tuple[ProjectionKind, ...] = ("pca", "random", "none")
    classifiers: tuple[ClassifierKind, ...] = ("logistic_regression", "mlp")

    def __post_init__(self) -> None:
        if self.trials < 1 or self.jobs < 1 or not 0 < self.validation < 1:
            raise UsageError(
                "tune needs at least one trial, at least one job, and a validation fraction between 0 and 1"
            )
        if self.timeout_s is not None and self.timeout_s <= 0:
            raise UsageError(f"--timeout: expected a time above 0 seconds, got {self.timeout_s:g}")


@dataclass(frozen=True)
class Source:
    """Images to compute features of, and the variants of the features."""

    dataset: Dataset
    backbone: BackboneOptions
    sizes: tuple[int, ...] = ()
    precisions: tuple[Precision, ...] = ("float32",)

    def __post_init__(self) -> None:
        if self.backbone.is_file and self.precisions != ("float32",):
            raise UsageError("--precisions does not apply to a backbone from a file: omit it")


@dataclass(frozen=True)
class VariantFacts:
    """The options with which training computes the features of a variant."""

    name: str
    input_size: int | None
    precision: Precision


@dataclass(frozen=True)
class Tuned:
    """The result of a search.

    Attributes:
        outcomes: outcomes of all trials of the study, best first.
        front: numbers of the trials on the Pareto front of accuracy and throughput (or number of components).
        failed: trial number → reason, for settings that could not be fitted.
        resumed: number of trials of earlier runs.
        rows: number of images (fitted on, validated on).
        study: the journal of the study.
        warnings: inferred properties of a backbone from a file, one line each.
    """

    outcomes: list[TrialResult]
    front: list[int]
    failed: dict[int, str]
    resumed: int
    variants: list[VariantFacts]
    rows: tuple[int, int]
    study: Path
    warnings: tuple[str, ...] = ()

    @property
    def best(self) -> TrialResult:
        return self.outcomes[0]


def tune(
    settings: Settings,
    options: TuneOptions,
    source: "Source | None" = None,
    *,
    on_step: Callable[[str], None] = lambda _: None,
    on_trial: Callable[[int], None] = lambda _: None,
) -> Tuned:
    """Search on the stored features of the champion's backbone, or on those of a data set.

    Args:
        source: images to compute features of; None for the stored features.
        on_trial: called with the number of finished trials after each batch.

    Raises:
        ServiceError: there is no champion or there are no labelled images; see also `search`.
        ModelError: the backbone is unknown or does not support the input size.
    """
    registry = open_registry(settings.home)
    champion = champion_of(registry)
    if source is None and champion is None:
        raise NotFoundError(
            f"there is no champion model in {registry.place}, whose features are needed: run 'imagestream train' "
            "first, or give --images or --dataset"
        )
    features = Table(settings.place.tables, "features")
    sides = Sides.of(options.holdout, options.validation, options.seed, chosen_groups(None, champion))
    with spark_session(settings, "imagestream tune", conf=MEMORY_FOR_FITTING) as spark:
        if source is not None:
            maker = VariantMaker(
                spark, features, source.dataset, source.backbone, settings.backbones_dir, sides, on_step
            )
            variants = maker.make(source.sizes or (source.backbone.input_size,), source.precisions)
        elif champion is not None:
            on_step("reading the stored features")
            trained_on = backbone_fitted_on(registry, champion, settings.place)
            variants = [stored_variant(spark, features, champion, sides, trained_on)]
        on_step("searching")
        return search(variants, options, settings.work_dir, on_trial)


def search(
    variants: Sequence[Variant], options: TuneOptions, work: Path, on_trial: Callable[[int], None] = lambda _: None
) -> Tuned:
    """Search, continuing the study in `work` if there is one.

    Args:
        variants: at least one variant of the features of the same images.
        work: folder for the study.
        on_trial: called with the number of finished trials after each batch.

    Raises:
        ServiceError: no trial could be fitted, another search is running, or the study is damaged.
    """
    folder = make_dir(work / "tune")
    path = folder / "studies.jsonl"
    with try_lock(folder / "lock", "another search is running in this home: wait until it has finished"):
        job = _Job(variants, options)
        first = job.spaces[variants[0].name].defaults()
        with open_study(path, job.name, options.seed, first) as study:
            resumed = len(finished(study))
            job.run(study, resumed, on_trial)
            outcomes = sorted(outcomes_of(study), key=lambda one: (-one.accuracy, one.log_loss, one.number))
            failed = {one.number: str(one.user_attrs.get("why")) for one in finished(study) if one.values is None}
    if not outcomes:
        raise ServiceError(f"none of {len(failed)} trials could be fitted; the last: {[*failed.values()][-1]}")
    facts = [VariantFacts(one.name, one.input_size, one.precision) for one in variants]
    rows = variants[0].n_fit, variants[0].n_validation
    guessed = tuple(dict.fromkeys(line for one in variants for line in one.guessed))
    return Tuned(outcomes, pareto_front(outcomes), failed, resumed, facts, rows, path, guessed)


def pareto_front(outcomes: Sequence[TrialResult]) -> list[int]:
    """Return the Pareto front of accuracy and throughput, most accurate first.

    With a single variant of the features, throughput hardly differs and the number of components replaces it.
    """
    by_speed = len({one.variant for one in outcomes}) > 1
    front: list[int] = []
    best = float("-inf")
    for one in sorted(outcomes, key=lambda one: (-one.accuracy, -_rating(one, by_speed), one.number)):
        if _rating(one, by_speed) > best:
            best = _rating(one, by_speed)
            front.append(one.number)
    return front


def _rating(outcome: TrialResult, by_speed: bool) -> float:
    return outcome.images_per_s if by_speed else -float(outcome.components)


@dataclass
class _Job:
    """A running search."""

    variants: Sequence[Variant]
    options: TuneOptions
    spaces: dict[str, Space] = field(default_factory=dict)
    pcas: dict[str, PCA] = field(default_factory=dict)
    known: dict[tuple[str, FitOptions], TrialResult] = field(default_factory=dict)

    def __post_init__(self) -> None:
        base = FitOptions(seed=self.options.seed, holdout=self.options.holdout)
        for one in self.variants:
            self.spaces[one.name] = make_space(
                self.options.projections, self.options.classifiers, one.n_features, one.n_fit, base
            )

    @property
    def name(self) -> str:
        """The name of the study: a hash of the data and the search space."""
        facts = [
            [(one.name, one.sha256) for one in self.variants],
            self.variants[0].fingerprint,
            [asdict(space) for space in self.spaces.values()],
            self.options.validation,
        ]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    def run(self, study: "optuna.Study", done: int, on_trial: Callable[[int], None]) -> None:
        """Fit batches of trials in threads and record them in order, so that the same seed gives the same search.

        Args:
            done: number of trials that have finished.
            on_trial: called with the number of finished trials after each batch.
        """
        began = time.monotonic()
        self.known = {(one.variant, one.options): one for one in outcomes_of(study)}
        pool = ThreadPoolExecutor(self.options.jobs)
        try:
            while done < self.options.trials:
                trials = [study.ask() for _ in range(min(self.options.jobs, self.options.trials - done))]
                asked = [self._suggested(trial) for trial in trials]
                for variant, options in asked:
                    if options.projection == "pca" and variant.name not in self.pcas:
                        self.pcas[variant.name] = fit_pca(gram_sums(variant.fit_rows), explained_variance=1.0)
                fitted = [pool.submit(self._fit, trial.number, *one) for trial, one in zip(trials, asked, strict=True)]
                for trial, one in zip(trials, fitted, strict=True):
                    record(study, trial, one.result())
                done += len(trials)
                on_trial(done)
                if self.options.timeout_s is not None and time.monotonic() - began > self.options.timeout_s:
                    break
        except KeyboardInterrupt:
            self.variants[0].fit_rows.sparkSession.sparkContext.cancelAllJobs()  # the threads wait for them
            raise
        finally:
            pool.shutdown(cancel_futures=True)

    def _suggested(self, trial: "optuna.Trial") -> tuple[Variant, FitOptions]:
        names = [one.name for one in self.variants]
        name = trial.suggest_categorical("features", names) if len(names) > 1 else names[0]
        return self.variants[names.index(name)], self.spaces[name].suggest(trial)

    def _fit(self, number: int, variant: Variant, options: FitOptions) -> TrialResult | str:
        """Fit and evaluate; return the reason if the settings cannot be fitted."""
        if (known := self.known.get((variant.name, options))) is not None:
            return TrialResult(**(vars(known) | {"number": number, "seconds": 0.0}))
        clock = time.perf_counter()
        try:
            projection = self._projection(variant, options)
            classifier = fit_classifier(variant.fit_rows, variant.n_fit, variant.classes, projection, options)
        except (ModelError, ServiceError) as error:
            return str(error)
        head = Head(variant.classes, projection, classifier)
        found = evaluate(variant.validation_rows, head)
        outcome = TrialResult(
            number=number,
            variant=variant.name,
            options=options,
            accuracy=found.accuracy,
            macro_f1=found.macro_f1,
            log_loss=found.log_loss,
            components=projection.n_out,
            images_per_s=variant.images_per_s(head),
            seconds=time.perf_counter() - clock,
        )
        self.known[variant.name, options] = outcome
        return outcome

    def _projection(self, variant: Variant, options: FitOptions) -> Projection:
        """Return the projection of `streaming.training.fit.fit_projection` without a pass over the rows per trial."""
        width = variant.n_features
        match options.projection:
            case "pca":
                whole = self.pcas[variant.name]
                ratio = whole.explained_variance_ratio.astype(float)
                kept = components_to_keep(ratio, whole.n_out, options.explained_variance, None)
                return PCA(whole.mean, whole.components[:kept], whole.explained_variance_ratio)
            case "random":
                k = johnson_lindenstrauss_dim(variant.n_fit, options.eps)
                return make_random_projection(width, k, options.seed)
            case "none":
                return NoProjection(width)
        return fit_projection(variant.fit_rows, variant.n_fit, options)
