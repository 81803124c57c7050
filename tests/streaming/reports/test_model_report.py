"""The model report: metrics on the holdout, a comparison on common images, and a self-contained page."""

import json
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyspark.sql import SparkSession

from models.arrays import write_npz
from models.backbone import FLATBUFFER_FILE, ExportedBackbone
from models.bundle import FITTED_ON, Bundle, TrainingData
from models.evaluation_sums import EvaluationSums
from models.scorer import Head, load_head
from streaming.errors import ServiceError
from streaming.images.labels import labelled_features
from streaming.images.split import Split
from streaming.registry import open_registry
from streaming.reports.model_report import VersionBundle, model_report
from streaming.reports.report_content import ModelReport, summary_of
from streaming.reports.report_page import write_page
from streaming.settings import Settings
from streaming.storage.files import list_array
from streaming.storage.tables import FEATURES, Table
from tests.conftest import imagestream
from tests.streaming.browser import chromium, open_page, requested
from tests.streaming.small_models import Digits, fit_head, register_model, seen_images, some_digits

N = 120
SCRIPT = "<script>document.title = 'owned'</script>"
NAMES = {"3": SCRIPT, "7": "$x^{7", "8": '" onmouseover="alert(8)'}
OTHER_BACKBONE = "f" * 64


@dataclass(frozen=True)
class Service:
    """A home with labelled features of digits and two versions, the second one poor; `held_out` is a mask of `ids`."""

    settings: Settings
    digits: Digits
    ids: list[str]
    held_out: np.ndarray

    @property
    def features(self) -> Table:
        return Table(self.settings.place.tables, "features")

    def version(self, number: int) -> VersionBundle:
        return VersionBundle(number, open_registry(self.settings.home).read(number))


def store(table: Table, digits: Digits, ids: list[str], sources: list[str], backbone: str, version: int) -> None:
    n = len(ids)
    given = {
        "image_id": ids,
        "source": sources,
        "label_true": digits.labels,
        "backbone_sha256": [backbone] * n,
        "features": list_array(digits.features),
    }
    columns = [given.get(field.name, pa.nulls(n, field.type)) for field in FEATURES]
    table.append(pa.table(columns, schema=FEATURES), "test", version)


@pytest.fixture(scope="module")
def service(
    spark: SparkSession, exported: ExportedBackbone, jars_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Service:
    home = tmp_path_factory.mktemp("reported")
    settings = Settings(home=home, jars=jars_dir)
    some = some_digits(exported, N)
    digits = replace(some, labels=[NAMES.get(label, label) for label in some.labels])
    ids, sources = [sha256(image).hexdigest() for image in digits.images], []
    for number, image in enumerate(digits.images):
        path = home / f"{number}.png"
        sources.append(str(path))
        if number % 3:  # a third of the files is missing
            path.write_bytes(image if number % 3 == 1 else image + b"\0")  # and a third has changed
    table = Table(settings.place.tables, "features")
    store(table, digits, ids, sources, exported.sha256, 0)
    half = Digits(digits.images[: N // 2], digits.labels[: N // 2], digits.features[: N // 2])
    store(table, half, ids[: N // 2], sources[: N // 2], OTHER_BACKBONE, 1)

    rows = labelled_features(spark, table, exported.sha256)
    chosen = {row.image_id for row in Split(42, 0.4).sides(rows)[1].select("image_id").collect()}
    held_out = np.array([one in chosen for one in ids])
    data = TrainingData(rows=N, holdout_rows=0, fingerprint="0" * 64, seed=42, holdout_share=0.4)
    seen = seen_images([image for image, out in zip(digits.images, held_out, strict=True) if not out])
    labels = [label for label, out in zip(digits.labels, held_out, strict=True) if not out]
    for k in (24, 2):
        head = fit_head(digits.features[~held_out], labels, k)
        register_model(open_registry(settings.home), exported, head, digits.images[:2], data, seen)
    return Service(settings, digits, ids, held_out)


@pytest.fixture(scope="module")
def report(spark: SparkSession, service: Service) -> ModelReport:
    """The report on version 1, compared with version 2."""
    return model_report(spark, service.settings.place, service.features, service.version(1), service.version(2))


def expected(service: Service, head: Head, rows: np.ndarray) -> EvaluationSums:
    labels = [label for label, taken in zip(service.digits.labels, rows, strict=True) if taken]
    sums = EvaluationSums(head.classes, len(head.classes))
    sums.add(head.logits(service.digits.features[rows]), np.array([head.classes.index(label) for label in labels]))
    return sums


def right(service: Service, number: int) -> np.ndarray:
    head = load_head(service.version(number).bundle)
    best = head.logits(service.digits.features).argmax(axis=1)
    return np.array([head.classes[i] == label for i, label in zip(best, service.digits.labels, strict=True)])


# --- the content


def test_metrics_are_those_of_the_held_out_images(report: ModelReport, service: Service) -> None:
    head = load_head(service.version(1).bundle)
    whole = expected(service, head, service.held_out).result()
    np.testing.assert_array_equal(report.evaluation.confusion, whole.confusion)
    assert report.evaluation.as_metrics() == pytest.approx(whole.as_metrics(), abs=1e-5)
    assert sum(report.balance["held out"]) == service.held_out.sum()
    assert sum(report.balance["for training"]) == (~service.held_out).sum()
    assert report.variance is not None
    assert report.variance[1] == 24


def test_versions_are_compared_image_by_image(report: ModelReport, service: Service) -> None:
    ours, theirs = (right(service, number)[service.held_out] for number in (1, 2))
    compared = report.comparison
    assert compared is not None
    counts = compared.counts
    assert (counts.both, counts.only_candidate) == ((ours & theirs).sum(), (ours & ~theirs).sum())
    assert (counts.only_champion, counts.neither) == ((~ours & theirs).sum(), (~ours & ~theirs).sum())
    assert (compared.ours.accuracy, compared.theirs.accuracy) == pytest.approx((ours.mean(), theirs.mean()))
    generator = np.random.default_rng(1)
    picks = generator.integers(0, len(ours), (4000, len(ours)))
    gains = ours[picks].mean(axis=1) - theirs[picks].mean(axis=1)
    assert compared.gain == pytest.approx(np.quantile(gains, [0.025, 0.975]), abs=1.01 / len(ours))  # one image
    assert 0 < compared.gain.low < counts.gain < compared.gain.high


def test_training_images_are_evaluated_separately(report: ModelReport, service: Service) -> None:
    whole = expected(service, load_head(service.version(1).bundle), ~service.held_out).result()
    assert report.fitted is not None
    np.testing.assert_array_equal(report.fitted.confusion, whole.confusion)
    assert summary_of(report)["fitted_metrics"]["accuracy"] == pytest.approx(whole.accuracy)
    assert whole.accuracy > report.evaluation.accuracy


def on_other_backbone(bundle: Bundle, backbone: str) -> Bundle:
    files = bundle.manifest.files | {FLATBUFFER_FILE: backbone}
    return replace(bundle, manifest=bundle.manifest.model_copy(update={"files": files}))


def test_versions_with_different_backbones_and_classes_are_compared_on_common_unseen_images(
    spark: SparkSession, service: Service
) -> None:
    """The other version was fitted on one class, and does not know another one."""
    common = service.held_out & (np.arange(N) < N // 2)
    labels = np.array(service.digits.labels)
    fitted, unknown, *_ = sorted({*labels[common]})
    bundle, of_class = service.version(2).bundle, zip(service.digits.images, labels, strict=True)
    seen = seen_images([image for image, label in of_class if label == fitted])
    renamed = tuple("renamed" if name == unknown else name for name in bundle.manifest.classes)
    manifest = bundle.manifest.model_copy(update={"classes": renamed})
    bundle = replace(bundle, manifest=manifest, files={**bundle.files, FITTED_ON: write_npz(seen.to_arrays())})
    other = VersionBundle(3, on_other_backbone(bundle, OTHER_BACKBONE))
    compared = model_report(spark, service.settings.place, service.features, service.version(1), other).comparison
    assert compared is not None
    expected_rows = (common & (labels != fitted)).sum()
    assert compared.ours.rows == compared.theirs.rows == compared.counts.rows == expected_rows
    assert compared.theirs.classes == (*renamed, unknown)
    assert compared.theirs.support[-1] == (common & (labels == unknown)).sum()
    assert compared.theirs.recall[-1] == 0


def test_impossible_comparison_or_evaluation_is_reported_in_one_line(spark: SparkSession, service: Service) -> None:
    unrelated = VersionBundle(3, on_other_backbone(service.version(2).bundle, "e" * 64))
    with pytest.raises(ServiceError, match="versions 1 and 3 cannot be compared: there is no labelled image with"):
        model_report(spark, service.settings.place, service.features, service.version(1), unrelated)
    with pytest.raises(ServiceError, match="version 3 may have been fitted on every labelled image in"):
        model_report(spark, service.settings.place, service.features, unrelated)


def test_images_are_shown_only_if_their_files_are_unchanged(report: ModelReport, service: Service) -> None:
    shown = [*report.samples, *report.mistakes]
    assert len(report.samples) == 9
    assert {one.pixels is not None for one in shown} == {True, False}
    for one in shown:
        number = service.ids.index(one.image_id)
        assert (one.pixels is not None) == (number % 3 == 1)
        assert one.label == service.digits.labels[number]
        assert one.source is not None
        assert one.source.endswith(f"/{number}.png")
    sure = [one.confidence for one in report.mistakes]
    assert sure == sorted(sure, reverse=True)
    assert all(one.label != one.predicted for one in report.mistakes)


# --- the page


@pytest.fixture(scope="module")
def written(report: ModelReport, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    page = tmp_path_factory.mktemp("page") / "report.html"
    return page, write_page(report, page)


def test_figures_are_written_as_png_next_to_the_page(written: tuple[Path, list[Path]]) -> None:
    page, figures = written
    names = {"confusion", "roc", "reliability", "variance", "balance", "samples"}
    assert {file.stem for file in figures} == names
    assert all(file.parent == page.parent / "report-figures" for file in figures)
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in figures)


@pytest.mark.parametrize(("dark", "width"), [(False, 1200), (True, 360)], ids=["light and wide", "dark on a phone"])
def test_page_is_self_contained_in_a_browser(
    written: tuple[Path, list[Path]], report: ModelReport, service: Service, dark: bool, width: int
) -> None:
    with chromium(dark=dark, width=width) as chrome:
        url = open_page(chrome, written[0])
        pictures = chrome.execute_script(
            "return Array.from(document.images, i => [i.complete && i.naturalWidth, i.alt, i.currentSrc.slice(0, 15)])"
        )
        shown = sum(one.pixels is not None for one in report.mistakes)
        assert len(pictures) == 6 + shown
        assert all(width > 0 and alt and source == "data:image/png;" for width, alt, source in pictures)
        assert requested(chrome) == {url}
        accuracy = chrome.execute_script("return document.querySelector('[data-figure=Accuracy]').textContent")
        assert accuracy == f"{report.evaluation.accuracy:.2%}"
        text = chrome.execute_script("return document.body.innerText")
        assert all(name in text for name in NAMES.values())
        assert chrome.title == "Model version 1"
        assert chrome.execute_script("return document.scripts.length") == 0
        assert chrome.execute_script("return document.querySelectorAll('[onmouseover]').length") == 0
        overflow = chrome.execute_script("return document.documentElement.scrollWidth - innerWidth")
        assert overflow <= 0
        background = chrome.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert background == ("rgb(14, 19, 25)" if dark else "rgb(243, 245, 248)")
        used = chrome.execute_script("return document.querySelector('picture img').currentSrc")
        assert (used == chrome.execute_script("return document.querySelector('picture source').srcset")) == dark


# --- the command


def test_command_writes_the_page_and_a_summary(service: Service, report: ModelReport, tmp_path: Path) -> None:
    page = tmp_path / "some page.html"
    found = imagestream(service.settings, "report", "--model", 1, "--against", 2, "--output", page)
    assert page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert len(found["figures"]) == 6
    expected_summary = json.loads(json.dumps(summary_of(report)))
    assert {name: found[name] for name in ("classes", "mistakes", "notes")} == {
        name: expected_summary[name] for name in ("classes", "mistakes", "notes")
    }
    assert found["metrics"] == pytest.approx(expected_summary["metrics"], abs=1e-6)
    assert found["comparison"]["only_this_right"] == expected_summary["comparison"]["only_this_right"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--against", "1"], "give the other with --model N"),
        (["--live", "--against", "1"], "--against compares on held-out images"),
        (["--model", "1", "--against", "1"], "--against compares two versions"),
        (["--model", "9"], "there is no model version 9"),
        (["--model", "1", "--output", "/"], "--output: expected a file in a writable folder, got /"),
    ],
)
def test_invalid_arguments_are_reported_in_one_line(service: Service, arguments: list[str], message: str) -> None:
    error = imagestream(service.settings, "report", *arguments, code=(1, 2))["stderr"]
    assert message in error
    assert error.count("\n") == 1
