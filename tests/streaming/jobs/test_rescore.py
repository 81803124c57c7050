"""Rescoring from stored features: exactly one prediction of the model per message, despite interruptions."""

import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Sequence
from datetime import UTC, date, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, write_deltalake

from models.backbone import ExportedBackbone
from models.errors import ModelError
from models.scorer import Head
from streaming.errors import ServiceError
from streaming.jobs import rescore as rescore_module
from streaming.jobs.rescore import rescore
from streaming.jobs.rescore_compare import compare
from streaming.query import query
from streaming.registry import open_registry
from streaming.settings import Settings
from streaming.storage.files import list_array
from streaming.storage.tables import FEATURES, LABELS, PREDICTIONS, Table
from tests.conftest import imagestream
from tests.streaming.small_models import Digits, fit_head, register_model, seen_images, some_digits

N = 40
FITTED = (20, 30)  # number of first digits that each version was fitted on
NOW = datetime(2024, 5, 6, 12, tzinfo=UTC)


@pytest.fixture(scope="module")
def digits(exported: ExportedBackbone) -> Digits:
    return some_digits(exported, N)


@pytest.fixture(scope="module")
def heads(digits: Digits) -> list[Head]:
    """The version that predicted, fitted on half of the digits, and the one that rescores, fitted on more."""
    return [fit_head(digits.features[:n], digits.labels[:n], k) for n, k in zip(FITTED, (4, 8), strict=True)]


@pytest.fixture(scope="module")
def models(
    exported: ExportedBackbone, heads: list[Head], digits: Digits, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    home = tmp_path_factory.mktemp("home")
    for n, head in zip(FITTED, heads, strict=True):
        register_model(open_registry(home), exported, head, digits.images[:2], seen=seen_images(digits.images[:n]))
    return home / "models"


@pytest.fixture
def settings(models: Path, tmp_path: Path) -> Settings:
    """A home with two model versions and no history."""
    (tmp_path / "models").symlink_to(models)
    return Settings(home=tmp_path)


def identities(settings: Settings, numbers: Sequence[int], labels: Sequence[str | None]) -> dict[str, Any]:
    """Identity columns of the messages `numbers`, in two partitions."""
    return {
        "image_id": [f"image {number}" for number in numbers],
        "topic": [settings.topic] * len(numbers),
        "partition": [number % 2 for number in numbers],
        "offset": [number // 2 for number in numbers],
        "label_true": list(labels),
    }


def store_features(
    settings: Settings, digits: Digits, numbers: Sequence[int], backbone: str, labels: Sequence[str | None] = ()
) -> None:
    """Write one file of `features`: message n contains digit n modulo N."""
    columns = identities(settings, numbers, labels or [None] * len(numbers)) | {
        "backbone_sha256": [backbone] * len(numbers),
        "features": list_array(digits.features[[number % N for number in numbers]]),
        "content_sha256": [sha256(digits.images[number % N]).hexdigest() for number in numbers],
    }
    table = pa.table(columns)
    given = [table.column(one.name) if one.name in columns else pa.nulls(len(table), one.type) for one in FEATURES]
    Table(settings.place.tables, "features").append(
        pa.table([one.cast(field.type) for one, field in zip(given, FEATURES, strict=True)], schema=FEATURES),
        f"test {min(numbers)}", 0,
    )  # fmt: skip


def store_predictions(
    settings: Settings, head: Head, digits: Digits, numbers: Sequence[int], labels: Sequence[str | None] = ()
) -> list[str]:
    answers = head.probabilities(digits.features[[number % N for number in numbers]])
    best = [head.classes[position] for position in answers.argmax(axis=1)]
    columns = identities(settings, numbers, labels or [None] * len(numbers))
    old = open_registry(settings.home).read(1).sha256
    rows = [
        dict(zip(columns, values, strict=True))
        | {"label": label, "confidence": 0.5, "model_version": 1, "bundle_sha256": old, "date": date(2024, 5, 6)}
        for label, *values in zip(best, *columns.values(), strict=True)
    ]
    Table(settings.place.tables, "predictions").append(
        pa.Table.from_pylist(rows, schema=PREDICTIONS), f"test {min(numbers)}", 0
    )
    return best


def rescored(settings: Settings) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = query(settings, 'FROM rescored ORDER BY "offset", "partition"').to_pylist()
    return found


@pytest.fixture
def history(settings: Settings, exported: ExportedBackbone, heads: list[Head], digits: Digits) -> Settings:
    """100 messages in five files, predicted by version 1, and a training image, which is not part of the history."""
    for start in range(0, 100, 20):
        numbers = range(start, start + 20)
        store_features(settings, digits, numbers, exported.sha256, [digits.labels[n % N] for n in numbers])
        store_predictions(settings, heads[0], digits, numbers, [digits.labels[n % N] for n in numbers])
    training = pa.table({
        "image_id": ["trained"], "backbone_sha256": [exported.sha256], "features": list_array(digits.features[:1])
    })  # fmt: skip
    columns = [
        training.column(one.name) if one.name in training.column_names else pa.nulls(1, one.type) for one in FEATURES
    ]
    Table(settings.place.tables, "features").append(pa.table(columns, schema=FEATURES), "training", 0)
    return settings


def test_every_message_is_rescored_once_by_the_new_version(
    history: Settings, digits: Digits, heads: list[Head]
) -> None:
    seen: list[int] = []
    result = rescore(history, 2, on_rows=seen.append)
    assert (result.rows, result.there_before, result.missing) == (100, 0, 0)
    assert sum(seen) == 101
    rows = rescored(history)
    assert [row["partition"] + 2 * row["offset"] for row in rows] == list(range(100))
    probabilities = heads[1].probabilities(digits.features[[number % N for number in range(100)]])
    assert [row["label"] for row in rows] == [heads[1].classes[i] for i in probabilities.argmax(axis=1)]
    np.testing.assert_allclose([row["confidence"] for row in rows], probabilities.max(axis=1), rtol=1e-6)
    sha256 = open_registry(history.home).read(2).sha256
    assert {(row["model_version"], row["bundle_sha256"]) for row in rows} == {(2, sha256)}
    assert [row["image_id"] for row in rows] == [f"image {number}" for number in range(100)]


def test_second_run_adds_only_new_messages(
    history: Settings, digits: Digits, heads: list[Head], exported: ExportedBackbone
) -> None:
    rescore(history, 2)
    again = rescore(history, 2)
    assert (again.rows, again.there_before) == (0, 100)
    store_features(history, digits, range(100, 120), exported.sha256)
    more = rescore(history, 2)
    assert (more.rows, more.there_before) == (20, 100)
    assert len(rescored(history)) == 120
    other = rescore(history, 1)
    assert (other.rows, other.there_before) == (120, 0)


def test_compaction_between_runs_rescores_nothing_twice(
    history: Settings, digits: Digits, exported: ExportedBackbone
) -> None:
    rescore(history, 2)
    store_features(history, digits, range(100, 120), exported.sha256)
    assert DeltaTable(history.place.table("features")).optimize.compact()["numFilesRemoved"] > 1
    assert rescore(history, 2).rows == 20
    rows = rescored(history)
    assert len({(row["partition"], row["offset"]) for row in rows}) == len(rows) == 120


def _rescore_until_killed(home: Path, after_rows: int) -> None:
    rescore_module.CHUNK_BYTES = 1  # a commit for each file
    seen = 0

    def on_rows(rows: int) -> None:
        nonlocal seen
        seen += rows
        if seen >= after_rows:
            os.kill(os.getpid(), signal.SIGKILL)

    rescore(Settings(home=home), 2, workers=1, on_rows=on_rows)


def test_killed_run_continues(history: Settings) -> None:
    child = multiprocessing.get_context("spawn").Process(target=_rescore_until_killed, args=(history.home, 90))
    child.start()
    child.join(300)
    assert child.exitcode == -signal.SIGKILL
    before = len(rescored(history))
    assert 0 < before < 100
    result = rescore(history, 2)
    assert (result.rows, result.there_before) == (100 - before, before)
    rows = rescored(history)
    assert len({(row["partition"], row["offset"]) for row in rows}) == len(rows) == 100


def test_comparison_counts_agreement_accuracy_and_changes(history: Settings, digits: Digits, heads: list[Head]) -> None:
    label = pa.table({"image_id": ["image 0"], "label": ["none of these"], "labelled_at": [NOW], "by": ["test"]})
    Table(history.place.tables, "labels").append(label.cast(LABELS), "test", 0)
    rescore(history, 2)
    found = compare(history, open_registry(history.home).read(2).sha256, limit=3)
    old, new = ([head.classes[i] for i in head.probabilities(digits.features).argmax(axis=1)] for head in heads)
    shown = [number % N for number in range(100)]
    truth = ["none of these", *(digits.labels[n] for n in shown[1:])]
    (row,) = found.agreement
    assert (row["old_version"], row["rows"], row["labelled"]) == (1, 100, 100)
    assert row["agreement"] == pytest.approx(np.mean([old[n] == new[n] for n in shown]))
    # Both are evaluated on images that neither was fitted on; the others are reported separately.
    evaluated = np.array([n >= max(FITTED) for n in shown])
    right = [np.array([answers[n] == t for n, t in zip(shown, truth, strict=True)]) for answers in (old, new)]
    assert (row["judged"], row["fitted"]) == (20, 80)
    for name, found_right in zip(("old_accuracy", "new_accuracy"), right, strict=True):
        assert row[name] == pytest.approx(found_right[evaluated].mean())
        assert row[f"fitted_{name}"] == pytest.approx(found_right[~evaluated].mean())
    assert row["only_new_right"] - row["only_old_right"] == (right[1][evaluated].sum() - right[0][evaluated].sum())
    assert row["fitted_new_accuracy"] > row["new_accuracy"]
    changed = [(old[n], new[n]) for n in shown if old[n] != new[n]]
    counts = [changed.count((one["old_label"], one["new_label"])) for one in found.changes]
    assert counts == [one["rows"] for one in found.changes]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == max(changed.count(pair) for pair in changed)
    assert len(found.changes) == 3


def test_versions_without_known_training_images_are_not_evaluated(
    history: Settings, models: Path, tmp_path: Path
) -> None:
    (history.work_dir / "models").unlink()
    (history.work_dir / "models" / "versions").mkdir(parents=True)
    for name in ("bundles", "versions/00000002.json"):
        (history.work_dir / "models" / name).symlink_to(models / name)
    rescore(history, 2)
    (row,) = compare(history, open_registry(history.home).read(2).sha256).agreement
    assert (row["labelled"], row["judged"], row["new_accuracy"], row["fitted"]) == (100, 0, None, 100)


def test_history_without_content_hashes_is_evaluated_by_image_ids(history: Settings, digits: Digits) -> None:
    """The table lacks the column `content_sha256`, so that images are identified by their ids."""
    directory = Path(history.place.tables) / "features"
    files = Table(history.place.tables, "features").files()
    rows = pa.concat_tables([pq.read_table(file) for file in files]).drop_columns(["content_sha256"])
    shutil.rmtree(directory)
    write_deltalake(directory, rows)
    rescore(history, 2)
    (row,) = compare(history, open_registry(history.home).read(2).sha256).agreement
    assert (row["judged"], row["fitted"]) == (100, 0)  # no id is the hash of an image here


def test_predictions_without_features_are_counted_and_refused_unless_allowed(
    history: Settings, digits: Digits, heads: list[Head]
) -> None:
    store_predictions(history, heads[0], digits, range(100, 107))
    with pytest.raises(ServiceError, match=r"7 of 107 predictions have no stored features .* --allow-missing"):
        rescore(history, 2)
    assert not (Path(history.place.tables) / "rescored").exists()
    result = rescore(history, 2, allow_missing=True)
    assert (result.rows, result.missing) == (100, 7)


def test_invalid_rescore_is_refused_in_one_line(settings: Settings, digits: Digits) -> None:
    with pytest.raises(ModelError, match="there is no model version 9"):
        rescore(settings, 9)
    with pytest.raises(ServiceError, match=r"no features are stored in .*imagestream stream"):
        rescore(settings, 2)
    store_features(settings, digits, range(30), "another backbone")
    with pytest.raises(ServiceError, match="all 30 stored rows are of another backbone") as refused:
        rescore(settings, 2)
    assert "\n" not in str(refused.value)


def test_command_rescores_and_compares(history: Settings) -> None:
    summary = imagestream(history, "rescore", "--model", 2, "--changes", 2)
    assert (summary["version"], summary["rows"], summary["missing"]) == (2, 100, 0)
    assert summary["agreement"][0]["rows"] == 100
    assert len(summary["changes"]) == 2
    json.dumps(summary)
