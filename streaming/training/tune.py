"""Searching the settings of projection and classifier on features that are computed once.

Optuna proposes settings a few at a time; as many threads fit them with Spark, on rows that stay in its partitions, and
what reaches the driver is a model and counts. Settings are compared on a part of the training side that no trial is
fitted on; the holdout, which the gate decides by, is never looked at. PCA is solved once, for every share of variance.

The study is a file of JSON lines in the home, under a name made of the data and of what is searched: another run on
the same data goes on where the last one ended, killed or not.
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
from streaming.images.exposure import backbone_fitted_on
from streaming.images.groups import chosen_groups
from streaming.images.split import Sides
from streaming.platform.session import spark_session
from streaming.registry import CHAMPION, open_registry
from streaming.settings import Settings
from streaming.storage.home import held, make_dir
from streaming.storage.tables import Table
from streaming.training.backbones import BackboneOptions
from streaming.training.evaluate import evaluate
from streaming.training.fit import fit_classifier, fit_projection
from streaming.training.fit_options import ClassifierKind, FitOptions, ProjectionKind
from streaming.training.sums import gram_sums
from streaming.training.tune_features import Variant, VariantMaker, stored_variant
from streaming.training.tune_space import Space, make_space
from streaming.training.tune_study import Outcome, finished, open_study, outcomes_of, tell

if TYPE_CHECKING:
    import optuna


@dataclass(frozen=True)
class TuneOptions:
    """How long to search, and in what.

    Attributes:
        trials: at most so many, those of earlier runs on the same data among them.
        timeout_s: begin no trial later than this, but for the first ones.
        jobs: trials at a time.
        validation: the share of the training side that settings are compared on.
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
            raise UsageError("tune needs at least one trial, one job, and a share of validation between 0 and 1")
        if self.timeout_s is not None and self.timeout_s <= 0:
            raise UsageError(f"the timeout should be above 0 seconds, got {self.timeout_s:g}")


@dataclass(frozen=True)
class Source:
    """Images to make features of, and in which ways."""

    dataset: Dataset
    backbone: BackboneOptions
    sizes: tuple[int, ...] = ()
    precisions: tuple[Precision, ...] = ("float32",)

    def __post_init__(self) -> None:
        if self.backbone.is_file and self.precisions != ("float32",):
            raise UsageError("a backbone from a file runs as it is: leave out --precisions")


@dataclass(frozen=True)
class VariantFacts:
    """What a training needs to make the features of a variant."""

    name: str
    input_size: int | None
    precision: Precision


@dataclass(frozen=True)
class Tuned:
    """What a search found.

    Attributes:
        outcomes: of all trials of the study, best first.
        front: numbers of those that no other beats in accuracy and speed (or components) at once.
        failed: number → why, of trials whose settings could not be fitted.
        resumed: trials that were there before.
        variants: the ways in which features were made.
        rows: images that were (fitted on, validated on).
        warnings: what was guessed of a backbone from a file, a line each.
    """

    outcomes: list[Outcome]
    front: list[int]
    failed: dict[int, str]
    resumed: int
    variants: list[VariantFacts]
    rows: tuple[int, int]
    study: Path
    warnings: tuple[str, ...] = ()

    @property
    def best(self) -> Outcome:
        return self.outcomes[0]


def tune(
    settings: Settings,
    options: TuneOptions,
    source: "Source | None" = None,
    *,
    on_step: Callable[[str], None] = lambda _: None,
    on_trial: Callable[[int], None] = lambda _: None,
) -> Tuned:
    """Search on the features that the champion's backbone has made so far, or on those of a data set.

    Raises:
        ServiceError: there is no champion to take the backbone of, nothing labelled, or see `search`.
        ModelError: an unknown backbone, or a size that it cannot take.
    """
    registry = open_registry(settings.home)
    current = registry.target(CHAMPION)
    champion = registry.read(current) if current else None
    if source is None and champion is None:
        raise NotFoundError(
            f"there is no champion model in {registry.place} whose features could be searched on; "
            "run 'imagestream train' first, or give --images or --dataset"
        )
    features = Table(settings.place.tables, "features")
    sides = Sides.of(options.holdout, options.validation, options.seed, chosen_groups(None, champion))
    with spark_session(settings, "imagestream tune") as spark:
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
    variants: Sequence[Variant],
    options: TuneOptions,
    work: Path,
    on_trial: Callable[[int], None] = lambda _: None,
) -> Tuned:
    """Search, going on from what the study in `work` holds.

    Args:
        variants: at least one way to make features, of the same images.
        on_trial: told how many trials there are, after each batch.

    Raises:
        ServiceError: not a single trial could be fitted, another search is at work, or the study is damaged.
    """
    folder = make_dir(work / "tune")
    path = folder / "studies.jsonl"
    with held(folder / "lock", "another search is at work in this home; wait until it is done"):
        job = _Job(variants, options)
        first = job.spaces[variants[0].name].defaults()
        with open_study(path, job.name, options.seed, first) as study:
            resumed = len(finished(study))
            job.run(study, resumed, on_trial)
            outcomes = sorted(outcomes_of(study), key=lambda one: (-one.accuracy, one.log_loss, one.number))
            failed = {one.number: str(one.user_attrs.get("why")) for one in finished(study) if one.values is None}
    if not outcomes:
        raise ServiceError(f"not one of {len(failed)} trials could be fitted; the last: {[*failed.values()][-1]}")
    facts = [VariantFacts(one.name, one.input_size, one.precision) for one in variants]
    rows = variants[0].n_fit, variants[0].n_validation
    guessed = tuple(dict.fromkeys(line for one in variants for line in one.guessed))
    return Tuned(outcomes, front_of(outcomes), failed, resumed, facts, rows, path, guessed)


def front_of(outcomes: Sequence[Outcome]) -> list[int]:
    """Those that none is better than in one way and as good in the other, most accurate first.

    Where there is one way to make features, speed hardly differs, and the number of components takes its place.
    """
    by_speed = len({one.variant for one in outcomes}) > 1
    front: list[int] = []
    best = float("-inf")
    for one in sorted(outcomes, key=lambda one: (-one.accuracy, -_worth(one, by_speed), one.number)):
        if _worth(one, by_speed) > best:
            best = _worth(one, by_speed)
            front.append(one.number)
    return front


def _worth(outcome: Outcome, by_speed: bool) -> float:
    return outcome.images_per_s if by_speed else -float(outcome.components)


@dataclass
class _Job:
    """A search at work."""

    variants: Sequence[Variant]
    options: TuneOptions
    spaces: dict[str, Space] = field(default_factory=dict)
    pcas: dict[str, PCA] = field(default_factory=dict)
    known: dict[tuple[str, FitOptions], Outcome] = field(default_factory=dict)

    def __post_init__(self) -> None:
        base = FitOptions(seed=self.options.seed, holdout=self.options.holdout)
        for one in self.variants:
            self.spaces[one.name] = make_space(
                self.options.projections, self.options.classifiers, one.n_features, one.n_fit, base
            )

    @property
    def name(self) -> str:
        """Of the study: made of all that the worth of settings depends on, and of what is searched."""
        facts = [
            [(one.name, one.sha256) for one in self.variants],
            self.variants[0].fingerprint,
            [asdict(space) for space in self.spaces.values()],
            self.options.validation,
        ]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    def run(self, study: "optuna.Study", done: int, on_trial: Callable[[int], None]) -> None:
        """Ask for a batch, fit it in threads, tell in order: so the same seed gives the same search."""
        began = time.monotonic()
        self.known = {(one.variant, one.options): one for one in outcomes_of(study)}
        pool = ThreadPoolExecutor(self.options.jobs)
        try:
            while done < self.options.trials:
                trials = [study.ask() for _ in range(min(self.options.jobs, self.options.trials - done))]
                asked = [self._suggested(trial) for trial in trials]
                for variant, options in asked:
                    self._solve_pca(variant, options)
                fitted = [pool.submit(self._fit, trial.number, *one) for trial, one in zip(trials, asked, strict=True)]
                for trial, one in zip(trials, fitted, strict=True):
                    tell(study, trial, one.result())
                done += len(trials)
                on_trial(done)
                if self.options.timeout_s is not None and time.monotonic() - began > self.options.timeout_s:
                    break
        except KeyboardInterrupt:
            self.variants[0].fit_rows.sparkSession.sparkContext.cancelAllJobs()  # what the threads wait for
            raise
        finally:
            pool.shutdown(cancel_futures=True)

    def _suggested(self, trial: "optuna.Trial") -> tuple[Variant, FitOptions]:
        names = [one.name for one in self.variants]
        name = trial.suggest_categorical("features", names) if len(names) > 1 else names[0]
        return self.variants[names.index(name)], self.spaces[name].suggest(trial)

    def _solve_pca(self, variant: Variant, options: FitOptions) -> None:
        if options.projection == "pca" and variant.name not in self.pcas:
            self.pcas[variant.name] = fit_pca(gram_sums(variant.fit_rows), explained_variance=1.0)

    def _fit(self, number: int, variant: Variant, options: FitOptions) -> Outcome | str:
        """Fit and evaluate; or why that cannot be."""
        if (known := self.known.get((variant.name, options))) is not None:
            return Outcome(**(vars(known) | {"number": number, "seconds": 0.0}))
        clock = time.perf_counter()
        try:
            projection = self._projection(variant, options)
            classifier = fit_classifier(variant.fit_rows, variant.n_fit, variant.classes, projection, options)
        except (ModelError, ServiceError) as error:
            return str(error)
        head = Head(variant.classes, projection, classifier)
        found = evaluate(variant.validation_rows, head)
        outcome = Outcome(
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
        """As `streaming.training.fit.fit_projection` would fit it, without passing over the rows for each trial."""
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
