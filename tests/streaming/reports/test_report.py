"""The report over real Delta tables: versions, quarantine, and champion compared with challenger."""

from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import write_deltalake

from models.backbone import ExportedBackbone
from streaming.dashboard import data
from streaming.dashboard.reader import Reader
from streaming.errors import ServiceError
from streaming.registry import open_registry
from streaming.reports.report import read_report
from streaming.settings import Settings
from streaming.storage.tables import FEATURES, PREDICTIONS, SHADOW
from tests.conftest import imagestream
from tests.streaming.history import commit_batch, prediction
from tests.streaming.small_models import fit_head, register_model, seen_images, some_digits

NOW = datetime(2024, 5, 6, 12, tzinfo=UTC)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path)


def write(settings: Settings, name: str, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
    write_deltalake(settings.place.table(name), pa.Table.from_pylist(rows, schema=schema), mode="append")


def predict(settings: Settings, version: int, answers: list[tuple[str, str | None]]) -> None:
    """(label, true label) of images 0-0, 0-1, …"""
    rows = [
        prediction(settings, 0, number)
        | {"model_version": version, "label": label, "label_true": truth, "confidence": 0.5 + 0.25 * (label == truth)}
        for number, (label, truth) in enumerate(answers)
    ]
    write(settings, "predictions", rows, PREDICTIONS)


def shadow(settings: Settings, version: int, answers: list[tuple[str, str, str | None]]) -> None:
    """(champion's label, challenger's, true label)."""
    rows = [
        {
            "image_id": f"0-{number}",
            "champion_label": champion,
            "label": challenger,
            "label_true": truth,
            "champion_confidence": 0.75,
            "confidence": 0.5,
            "model_version": version,
        }
        for number, (champion, challenger, truth) in enumerate(answers)
    ]
    write(settings, "shadow", rows, SHADOW)


def test_each_version_has_its_count_accuracy_and_confidence(settings: Settings) -> None:
    predict(settings, 1, [("cat", "cat"), ("cat", "dog"), ("dog", None)])
    predict(settings, 2, [("cat", None)])
    first, second = read_report(settings).versions
    assert (first["version"], first["rows"], first["labelled"], first["accuracy"]) == (1, 3, 2, 0.5)
    assert first["mean_confidence"] == pytest.approx((0.75 + 0.5 + 0.5) / 3)
    assert (second["version"], second["labelled"], second["accuracy"]) == (2, 0, None)


def test_later_label_counts_and_the_latest_wins(settings: Settings) -> None:
    predict(settings, 1, [("cat", "dog"), ("cat", None), ("cat", None)])
    labels = [
        {"image_id": image, "label": label, "labelled_at": NOW + timedelta(hours=hours)}
        for image, label, hours in (("0-0", "dog", 0), ("0-0", "cat", 2), ("0-0", "dog", 1), ("0-1", "dog", 0))
    ]
    schema = pa.schema([("image_id", pa.string()), ("label", pa.string()), ("labelled_at", pa.timestamp("us", "UTC"))])
    write(settings, "labels", labels, schema)
    (version,) = read_report(settings).versions
    assert (version["rows"], version["labelled"], version["accuracy"]) == (3, 2, 0.5)


def test_champion_and_challenger_are_compared_on_the_same_images(settings: Settings) -> None:
    predict(settings, 1, [("cat", None)])
    shadow(
        settings,
        2,
        [
            ("cat", "cat", "cat"),
            ("cat", "dog", "dog"),
            ("cat", "dog", "dog"),
            ("dog", "cat", "dog"),
            ("cat", "dog", None),
        ],
    )
    found = read_report(settings)
    (row,) = found.agreement
    assert (row["challenger"], row["rows"], row["agreement"], row["labelled"]) == (2, 5, 0.2, 4)
    # These versions are not in the registry, so any image may be a training image: none is used for their accuracy.
    assert (row["judged"], row["fitted"], row["champion_accuracy"], row["challenger_accuracy"]) == (0, 4, None, None)
    assert (row["fitted_champion_accuracy"], row["fitted_challenger_accuracy"]) == (0.5, 0.75)
    assert (row["champion_confidence"], row["challenger_confidence"]) == (0.75, 0.5)
    assert [(one["champion_label"], one["challenger_label"], one["rows"]) for one in found.disagreements] == [
        ("cat", "dog", 3),
        ("dog", "cat", 1),
    ]
    assert [(one["champion_right"], one["challenger_right"]) for one in found.disagreements] == [(0, 2), (1, 0)]


def test_training_images_of_champion_or_challenger_are_evaluated_separately(
    settings: Settings, exported: ExportedBackbone
) -> None:
    """The champion was fitted on the first of six images, the challenger on the second, which has another key."""
    digits = some_digits(exported, 40)
    head, registry = fit_head(digits.features, digits.labels), open_registry(settings.home)
    for number in (0, 1):
        register_model(registry, exported, head, digits.images[:2], seen=seen_images([digits.images[number]]))
    shas = [registry.read(version).sha256 for version in (1, 2)]
    contents = [sha256(image).hexdigest() for image in digits.images[:6]]
    ids = [contents[0], "another key", *contents[2:]]
    place = [{"topic": "images", "partition": 0, "offset": n, "image_id": name} for n, name in enumerate(ids)]
    right = [(True, False), (False, True), (True, True), (False, True), (False, True), (True, False)]
    answers = [
        one | {"label_true": "cat", "champion_label": "cat" if a else "dog", "label": "cat" if b else "dog"}
        for one, (a, b) in zip(place, right, strict=True)
    ]
    batches = {
        "predictions": ([one | {"model_version": 1, "bundle_sha256": shas[0]} for one in place], PREDICTIONS),
        "shadow": ([one | {"model_version": 2, "bundle_sha256": shas[1]} for one in answers], SHADOW),
        "features": ([place[1] | {"content_sha256": contents[1]}], FEATURES),
    }
    for name, (rows, schema) in batches.items():
        write(settings, name, rows, schema)
    (row,) = read_report(settings).agreement
    assert (row["labelled"], row["judged"], row["fitted"]) == (6, 4, 2)
    assert (row["champion_accuracy"], row["challenger_accuracy"]) == (0.5, 0.75)
    assert (row["only_champion_right"], row["only_challenger_right"]) == (1, 2)
    assert (row["fitted_champion_accuracy"], row["fitted_challenger_accuracy"]) == (0.5, 0.5)
    reader = Reader(settings.place)
    reader.version("predictions", "shadow", "labels")
    assert data.agreement(reader, 2) == row


def test_report_can_be_limited_to_one_challenger(settings: Settings) -> None:
    predict(settings, 1, [("cat", None)])
    shadow(settings, 2, [("cat", "dog", None)])
    shadow(settings, 3, [("cat", "cat", None)])
    assert [row["challenger"] for row in read_report(settings).agreement] == [2, 3]
    found = read_report(settings, challenger=3)
    assert ([row["challenger"] for row in found.agreement], found.disagreements) == ([3], [])
    assert len(read_report(settings, limit=1).disagreements) == 1


def test_command_reports_a_stream_without_a_challenger(settings: Settings) -> None:
    commit_batch(settings, 0, {0: (0, 10)}, bad={3, 4, 5})
    found = imagestream(settings, "report")
    assert [(row["version"], row["rows"]) for row in found["versions"]] == [(1, 7)]
    assert found["quarantined"] == [
        {"reason": "truncated", "rows": 2, "replayed": 0},
        {"reason": "not_an_image", "rows": 1, "replayed": 0},
    ]
    assert found["agreement"] == found["disagreements"] == []


def test_report_without_predictions_is_rejected(settings: Settings) -> None:
    with pytest.raises(ServiceError, match="no predictions yet"):
        read_report(settings)


def test_drift_is_reported_for_the_newest_large_batches(settings: Settings) -> None:
    figures = {"psi_max": 0.3, "component": 7.0, "psi_mean": 0.1, "mean_shift": 0.5, "spread": 1.1}
    figures |= {"low_confidence": 0.2, "low_confidence_in_training": 0.1}
    for number, images in enumerate((500, 20, 400)):
        ranges = {0: (3 * number, 3 * number + 3)}
        commit_batch(settings, number, ranges, drift=figures | {"rows": float(images)})
    found = read_report(settings).drift
    assert [(row["batch_id"], row["images"]) for row in found] == [(2, 400), (0, 500)]
    assert (found[0]["psi_max"], found[0]["component"], found[0]["low_confidence"]) == (0.3, 7, 0.2)
    assert len(read_report(settings, limit=1).drift) == 1
    assert found[0]["alarm"] is None
    window = {"window_rows": 510.0, "window_psi": 0.4, "p_value": 1e-7, "p_limit": 3e-5, "alarm": 1.0}
    commit_batch(settings, 3, {0: (9, 12)}, drift=figures | {"rows": 20.0} | window)
    (last, *_) = read_report(settings).drift
    assert (last["batch_id"], last["window_images"], last["p_value"], last["alarm"]) == (3, 510, 1e-7, True)
