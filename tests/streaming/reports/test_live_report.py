"""The live report: metrics of stored predictions, read from Delta tables; unavailable metrics are noted."""

import hashlib
import io
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from deltalake import write_deltalake
from PIL import Image
from sklearn.metrics import f1_score

from streaming.errors import ServiceError
from streaming.reports import live_report
from streaming.reports.live_report import read_live_report
from streaming.settings import Settings
from streaming.storage.tables import PREDICTIONS
from tests.conftest import imagestream
from tests.streaming.history import prediction

NOW = datetime(2024, 5, 6, 12, tzinfo=UTC)
CLASSES = ("cat", "cow", "dog")


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home")


def predict(settings: Settings, answers: list[dict[str, Any]]) -> None:
    rows = [prediction(settings, 0, number) | {"model_version": 1} | one for number, one in enumerate(answers)]
    data = pa.Table.from_pylist(rows, schema=PREDICTIONS)
    write_deltalake(settings.place.table("predictions"), data, mode="append")


def some_answers(n: int) -> list[dict[str, Any]]:
    """Predictions of which about two thirds are right, and one in ten has no label."""
    generator = np.random.default_rng(0)
    truth = generator.integers(0, 3, n)
    predicted = np.where(generator.random(n) < 0.65, truth, generator.integers(0, 3, n))
    return [
        {
            "label": CLASSES[answer],
            "label_true": None if number % 10 == 0 else CLASSES[true],
            "confidence": float(confidence),
        }
        for number, (true, answer, confidence) in enumerate(
            zip(truth, predicted, generator.uniform(0.34, 1, n), strict=True)
        )
    ]


def test_metrics_are_those_of_the_labelled_predictions(settings: Settings) -> None:
    answers = some_answers(300)
    predict(settings, answers)
    known = [one for one in answers if one["label_true"]]
    found = read_live_report(settings).evaluation
    assert found.rows == len(known) == 270
    assert set(found.classes) >= set(CLASSES)
    assert found.accuracy == pytest.approx(np.mean([one["label"] == one["label_true"] for one in known]))
    both = [[one[name] for one in known] for name in ("label_true", "label")]
    assert found.macro_f1 == pytest.approx(f1_score(*both, average="macro"))
    assert found.reliability[0].sum() == 270
    assert 0 < found.calibration_error < 1


def test_later_labels_count_and_the_latest_wins(settings: Settings) -> None:
    predict(settings, [{"label": "cat", "label_true": "cat"}, {"label": "cat"}, {"label": "dog"}])
    given = [("0-0", "dog", 0), ("0-1", "dog", 0), ("0-1", "cat", 2), ("0-1", "cow", 1)]
    labels = [{"image_id": i, "label": label, "labelled_at": NOW + timedelta(hours=h)} for i, label, h in given]
    schema = pa.schema([("image_id", pa.string()), ("label", pa.string()), ("labelled_at", pa.timestamp("us", "UTC"))])
    write_deltalake(settings.place.table("labels"), pa.Table.from_pylist(labels, schema=schema))
    found = read_live_report(settings)
    assert (found.evaluation.rows, found.evaluation.correct) == (2, 1)
    assert [(one.image_id, one.label, one.predicted) for one in found.mistakes] == [("0-0", "dog", "cat")]


def test_report_can_be_limited_to_one_version(settings: Settings) -> None:
    predict(settings, [{"label": "cat", "label_true": "cat"}] * 3)
    predict(settings, [{"label": "cat", "label_true": "dog", "model_version": 2}])
    assert read_live_report(settings).evaluation.accuracy == 0.75
    assert "by model version 1, 2" in read_live_report(settings).about
    found = read_live_report(settings, 2)
    assert (found.evaluation.rows, found.evaluation.accuracy) == (1, 0.0)
    with pytest.raises(ServiceError, match="no prediction of version 3 has a label yet"):
        read_live_report(settings, 3)


def test_metrics_unavailable_from_stored_answers_are_omitted_and_noted(settings: Settings) -> None:
    top_k = [{"label": "cat", "probability": 0.6}, {"label": "dog", "probability": 0.3}]
    rows = [{"label": "cat", "label_true": truth, "top_k": top_k} for truth in ("cat", "dog", "cow", "dog")]
    predict(settings, rows)
    found = read_live_report(settings)
    assert not {"log_loss", "macro_auc"} & set(found.evaluation.as_metrics())
    (note,) = found.notes
    assert "log loss and ROC curves are not available" in note
    assert "75.00% of the images" in note


def test_excess_labels_are_counted_together(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_report, "MAX_CLASSES", 3)
    answers = [{"label": "cat", "label_true": f"spam {number}"} for number in range(40)]
    predict(settings, [*answers, *({"label": "cat", "label_true": "dog"} for _ in range(5))])
    found = read_live_report(settings).evaluation
    assert found.classes[:4] == ("cat", "dog", "spam 0", "(other labels)")
    assert found.support.tolist() == [0, 5, 1, 39, 0]
    assert (found.rows, found.correct) == (45, 0)


def test_correctness_does_not_depend_on_counting_labels_together(settings: Settings) -> None:
    """1,000 classes and random answers: 3 are right; comparing the merged labels would give 675."""
    truth, predicted = np.random.default_rng(0).integers(0, 1000, (2, 5000))
    predict(
        settings,
        [{"label": f"{answer}", "label_true": f"{true}"} for true, answer in zip(truth, predicted, strict=True)],
    )
    found = read_live_report(settings).evaluation
    assert (found.rows, found.correct) == (5000, int((truth == predicted).sum()))
    known = {name: index for index, name in enumerate(found.classes)}
    names = [f"{number}" for number in range(1000) if f"{number}" in known]
    assert len(names) == live_report.MAX_CLASSES
    assert [found.support[known[name]] for name in names] == [int((truth == int(name)).sum()) for name in names]
    hits = [int(((truth == int(name)) & (predicted == int(name))).sum()) for name in names]
    assert [found.confusion[known[name], known[name]] for name in names] == hits


def test_image_is_shown_only_if_its_file_still_matches(settings: Settings, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
    path, image_id = tmp_path / "red.png", hashlib.sha256(buffer.getvalue()).hexdigest()
    path.write_bytes(buffer.getvalue())
    there = {"image_id": image_id, "source": str(path)}
    predict(
        settings,
        [{"label": "cat", "label_true": "dog"} | there, {"label": "cat", "label_true": "cow", "source": "/dev/zero"}],
    )
    found = {one.label: one.pixels for one in read_live_report(settings).mistakes}
    assert found["cow"] is None
    assert found["dog"] is not None
    np.testing.assert_array_equal(found["dog"][0, 0], (255, 0, 0))


def test_command_writes_the_page_without_a_jvm(settings: Settings, tmp_path: Path) -> None:
    predict(settings, some_answers(100))
    page = tmp_path / "live.html"
    found = imagestream(settings, "report", "--live", "--output", page)
    assert found["metrics"]["holdout_rows"] == 90
    assert "Live predictions" in page.read_text(encoding="utf-8")
    assert {Path(file).stem for file in found["figures"]} == {"confusion", "reliability", "balance", "samples"}
    assert not (settings.work_dir / "spark.log").exists()


def test_report_without_labelled_predictions_is_rejected(settings: Settings) -> None:
    with pytest.raises(ServiceError, match="no predictions yet"):
        read_live_report(settings)
    predict(settings, [{"label": "cat"}])
    with pytest.raises(ServiceError, match="no prediction has a label yet"):
        read_live_report(settings)
