"""The search for options: it fits as training does, on rows that are not held out, and can be resumed."""

import json
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import typer
from PIL import Image
from pyspark.sql import DataFrame, SparkSession
from sklearn.datasets import load_digits
from typer.testing import CliRunner

from models.arrays import Features
from models.random_projection import johnson_lindenstrauss_dim
from streaming.cli.app import program
from streaming.cli.fit_options import with_fit_options
from streaming.errors import ServiceError
from streaming.images.dataset import digit_images, read_dataset, write_images
from streaming.images.split import Sides
from streaming.registry import open_registry
from streaming.settings import Settings
from streaming.storage.files import list_array
from streaming.storage.home import try_lock
from streaming.storage.tables import Table
from streaming.training import tune
from streaming.training.backbones import BackboneOptions
from streaming.training.evaluate import evaluate
from streaming.training.fit import fit
from streaming.training.fit_options import FitOptions
from streaming.training.tune import Tuned, TuneOptions, pareto_front, search
from streaming.training.tune_features import Variant, VariantMaker
from streaming.training.tune_plot import plot_trade_offs
from streaming.training.tune_space import command_of, describe, make_space, options_from_record
from streaming.training.tune_study import TrialResult
from tests.conftest import imagestream

ROWS, WIDTH, CLASSES = 300, 8, ("8", "9")
QUICK = FitOptions(max_iter=3)  # each iteration is a Spark job


@pytest.fixture(scope="module", autouse=True)
def quick_fits() -> Iterator[None]:
    """Trials with few iterations, which the space does not search for logistic regression."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tune, "FitOptions", partial(FitOptions, max_iter=QUICK.max_iter))
        yield


@pytest.fixture(scope="module")
def rows(spark: SparkSession) -> Iterator[DataFrame]:
    """image_id, label and features of digits: few features, so that the classes overlap and fits converge fast."""
    data = load_digits()
    chosen = np.flatnonzero(np.isin(data.target, [int(name) for name in CLASSES]))[:ROWS]
    means_of_columns = (data.images[chosen].mean(axis=1) / 16).astype(np.float32)
    ids = [sha256(b"%d" % number).hexdigest() for number in range(ROWS)]
    labels = [str(one) for one in data.target[chosen]]
    table = pa.table({"image_id": ids, "label": labels, "features": list_array(means_of_columns)})
    frame = spark.createDataFrame(table).coalesce(1).persist()
    yield frame
    frame.unpersist()


@pytest.fixture(scope="module")
def sides() -> Sides:
    return Sides.of(0.2, 0.25, 42)


@pytest.fixture(scope="module")
def variant(rows: DataFrame, sides: Sides) -> Variant:
    fit_rows, validation_rows = (part.persist() for part in sides.training(rows))
    sample: Features = np.zeros((8, WIDTH), np.float32)
    n_fit, n_validation = fit_rows.count(), validation_rows.count()
    counts = n_fit, n_validation
    return Variant(
        "stored", None, "float32", "a" * 64, WIDTH, CLASSES, fit_rows, validation_rows, *counts, "f", 0.01, sample
    )


def comparable(found: Tuned) -> list[tuple[int, FitOptions, float, int]]:
    outcomes = sorted(found.outcomes, key=lambda one: one.number)
    return [(one.number, one.options, round(one.accuracy, 6), one.components) for one in outcomes]


def ids_of(frame: DataFrame) -> set[str]:
    return {row.image_id for row in frame.select("image_id").collect()}


def test_trials_are_compared_on_rows_neither_fitted_on_nor_held_out(
    rows: DataFrame, sides: Sides, variant: Variant
) -> None:
    _, holdout = sides.holdout.sides(rows)
    parts = [ids_of(holdout), ids_of(variant.fit_rows), ids_of(variant.validation_rows)]
    assert sum(map(len, parts)) == len(set().union(*parts)) == ROWS
    assert [len(part) / ROWS for part in parts] == pytest.approx([0.2, 0.6, 0.2], abs=0.12)  # 5 standard deviations


def test_search_fits_as_training_does_and_is_deterministic(variant: Variant, tmp_path: Path) -> None:
    options = TuneOptions(trials=3, jobs=2, projections=("pca", "random"), classifiers=("logistic_regression",))
    progress: list[int] = []
    found = search([variant], options, tmp_path / "one", on_trial=progress.append)
    assert progress == [2, 3]
    again = search([variant], replace(options, trials=2), tmp_path / "two")
    assert comparable(again) == comparable(found)[:2]
    accuracies = [one.accuracy for one in found.outcomes]
    assert accuracies == sorted(accuracies, reverse=True)
    assert found.rows == (variant.n_fit, variant.n_validation)
    first = next(one for one in found.outcomes if one.number == 0)
    assert first.options == QUICK
    fitted = fit(variant.fit_rows, first.options)
    assert first.components == fitted.head.projection.n_out
    trained = evaluate(variant.validation_rows, fitted.head)
    assert (first.accuracy, first.log_loss) == pytest.approx((trained.accuracy, trained.log_loss), abs=1e-4)


def test_second_run_resumes_the_study_and_ignores_killed_trials(variant: Variant, tmp_path: Path) -> None:
    options = TuneOptions(trials=1, projections=("none",), classifiers=("logistic_regression",))
    first = search([variant], options, tmp_path)
    journal = first.study.read_bytes()
    more = search([variant], replace(options, trials=3), tmp_path)
    assert (first.resumed, more.resumed) == (0, 1)
    assert comparable(more)[:1] == comparable(first)
    assert len({one.options for one in more.outcomes}) == 3
    assert more.study.read_bytes().startswith(journal)
    # The journal after a kill: the last two trials were started and not finished, and a line is incomplete.
    lines = more.study.read_bytes().splitlines(keepends=True)
    started = max(place for place, line in enumerate(lines) if json.loads(line)["op_code"] == 4)
    more.study.write_bytes(b"".join(lines[: started + 1]) + lines[-1][:9])
    last = search([variant], replace(options, trials=3), tmp_path)
    assert (last.resumed, len(last.outcomes)) == (1, 3)
    nothing = search([variant], replace(options, trials=3), tmp_path)
    assert (nothing.resumed, len(nothing.outcomes)) == (3, 3)


def test_search_stops_at_its_timeout_and_locks_the_home(variant: Variant, tmp_path: Path) -> None:
    options = TuneOptions(trials=1000, jobs=1, timeout_s=1e-6, classifiers=("logistic_regression",))
    assert len(search([variant], options, tmp_path).outcomes) == 1
    with try_lock(tmp_path / "tune" / "lock", ""), pytest.raises(ServiceError, match="another search is running"):
        search([variant], options, tmp_path)
    (tmp_path / "tune" / "studies.jsonl").write_text("not\njson\n")
    with pytest.raises(ServiceError, match=r"studies.jsonl cannot be read .* remove the file"):
        search([variant], options, tmp_path)


def test_failed_trials_are_reported(variant: Variant, tmp_path: Path) -> None:
    constant = variant.fit_rows.selectExpr("image_id", "label", "transform(features, x -> float(1)) AS features")
    broken = replace(variant, name="constant", fit_rows=constant, sha256="b" * 64)
    options = TuneOptions(trials=2, projections=("randomized_pca",), classifiers=("logistic_regression",))
    with pytest.raises(ServiceError, match=r"none of 2 trials could be fitted; .*features that vary"):
        search([broken], options, tmp_path)


def test_invalid_tune_options_are_rejected() -> None:
    for invalid in ({"trials": 0}, {"jobs": 0}, {"validation": 1.0}, {"timeout_s": 0.0}):
        with pytest.raises(ServiceError):
            TuneOptions(**invalid)  # type: ignore[arg-type]


# --- the space


class Choices:
    """A trial that suggests the same end of every range."""

    def __init__(self, end: int) -> None:
        self.end = end

    def suggest_categorical(self, name: str, choices: tuple[object, ...]) -> object:
        return choices[self.end]

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        return (low, high)[self.end] * 1.000123

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int:
        return (low, high)[self.end]


SUGGESTED = [
    make_space(projections, classifiers, 1280, 4000, FitOptions()).suggest(Choices(end))  # type: ignore[arg-type]
    for projections in (("pca",), ("random",), ("randomized_pca",), ("none",))
    for classifiers in (("logistic_regression",), ("mlp",))
    for end in (0, -1)
]


@pytest.mark.parametrize("options", SUGGESTED, ids=describe)
def test_printed_command_reproduces_the_options(options: FitOptions) -> None:
    parsed: list[FitOptions] = []
    app = typer.Typer()

    @app.command()
    @with_fit_options
    def train(options: FitOptions) -> None:
        parsed.append(options)

    done = CliRunner().invoke(app, command_of(options, []))
    assert done.exit_code == 0, done.output
    assert parsed == [options]
    assert options_from_record(json.loads(json.dumps(options.as_record()))) == options


def test_space_contains_only_projections_that_reduce_the_width() -> None:
    narrow = make_space(("pca", "random"), ("mlp",), 64, 5000, FitOptions())
    assert narrow.projections == ("pca",)
    space = make_space(("random",), ("mlp",), 1280, 5000, FitOptions())
    assert johnson_lindenstrauss_dim(5000, space.lowest_eps) < 1280
    assert johnson_lindenstrauss_dim(5000, space.lowest_eps - 0.02) >= 1280
    wide = make_space(("pca", "random", "none"), ("mlp",), 62_720, 5000, FitOptions())
    assert wide.projections == ("randomized_pca", "random", "none")
    with pytest.raises(
        ServiceError, match="the search space is empty: a random projection does not reduce 64 features"
    ):
        make_space(("random",), ("mlp",), 64, 5000, FitOptions())


# --- trade-offs


def outcome(
    number: int, accuracy: float, components: int, images_per_s: float = 1.0, variant: str = "a"
) -> TrialResult:
    return TrialResult(number, variant, FitOptions(), accuracy, accuracy, 0.5, components, images_per_s, 1.0)


def test_pareto_front_contains_the_non_dominated_trials(tmp_path: Path) -> None:
    one_variant = [
        outcome(0, 0.9, 100),
        outcome(1, 0.9, 50),
        outcome(2, 0.8, 60),
        outcome(3, 0.7, 10),
        outcome(4, 0.95, 200),
    ]
    assert pareto_front(one_variant) == [4, 1, 3]
    two_variants = [outcome(0, 0.9, 10, 50.0), outcome(1, 0.8, 10, 200.0, "b"), outcome(2, 0.85, 5, 40.0)]
    assert pareto_front(two_variants) == [0, 1]
    ranked = sorted(one_variant, key=lambda one: -one.accuracy)
    plot_trade_offs(
        Tuned(ranked, pareto_front(one_variant), {}, 0, [], (80, 20), tmp_path), tmp_path / "folder" / "a.png"
    )
    with Image.open(tmp_path / "folder" / "a.png") as picture:
        assert picture.format == "PNG"
        assert picture.width > 500


# --- variants of the features, and the command


@pytest.mark.usefixtures("exports_here")
def test_input_sizes_and_precisions_become_variants_of_the_same_images(
    spark: SparkSession, exports: Path, tmp_path: Path
) -> None:
    dataset = read_dataset(write_images(tmp_path / "images", digit_images(40)))
    maker = VariantMaker(
        spark,
        Table(tmp_path / "tables", "features"),
        dataset,
        BackboneOptions("cnn_color", "random"),
        exports,
        Sides.of(0.2, 0.25, 42),
        lambda _: None,
    )
    variants = maker.make((24,), ("float32", "int8"))
    assert [one.name for one in variants] == ["24 float32", "24 int8"]
    assert [(one.input_size, one.precision, one.n_features) for one in variants] == [
        (24, "float32", 128),
        (24, "int8", 128),
    ]
    assert variants[0].sha256 != variants[1].sha256
    assert variants[0].fingerprint == variants[1].fingerprint
    assert ids_of(variants[0].fit_rows) == ids_of(variants[1].fit_rows)
    options = TuneOptions(trials=1, projections=("none",), classifiers=("logistic_regression",))
    found = search(variants, options, tmp_path)
    assert len(found.variants) == 2
    assert {one.variant for one in found.outcomes} <= {"24 float32", "24 int8"}
    assert all(one.images_per_s > 0 for one in found.outcomes)


def test_tune_searches_stored_features_and_prints_the_training_command(
    trained: Path, jars_dir: Path, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    shutil.copytree(trained, home, symlinks=True)
    settings = Settings(home=home, jars=jars_dir)
    little = ("--trials", 2, "--classifiers", "logistic_regression", "--projections", "none")
    found = imagestream(settings, "tune", *little)
    assert len(found["trials"]) == 2
    assert found["best"]["accuracy"] == max(one["accuracy"] for one in found["trials"])
    assert found["command"].startswith(shlex.join([*program(), "--home", str(home), "retrain"]))
    assert Path(found["plot"]).stat().st_size > 0
    training_rows = open_registry(home).read(1).manifest.training_data.rows  # with the same held-out images
    assert found["fit_rows"] + found["validation_rows"] == training_rows
    failed = imagestream(settings, "tune", "--input-sizes", "160", code=2)
    assert failed["stderr"].count("\n") == 1
    assert "give the images with --images or --dataset" in failed["stderr"]
    failed = imagestream(Settings(home=tmp_path / "empty", jars=jars_dir), "tune", code=1)
    assert "there is no champion model" in failed["stderr"]
