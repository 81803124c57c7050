"""The promotion gate: comparing a candidate with the champion. Its error rates: tests/statistics/test_gate.py."""

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyspark.sql import DataFrame, Row, SparkSession

from models.bundle import BackboneEntry, Manifest, StageEntry, TrainingData
from models.classifier import LogisticRegression
from models.errors import ModelError
from models.objective import ACCURACY, MIN_PROBABILITY, Objective
from models.paired import F1Gain, MeanGain, PairedCounts
from models.projection import NoProjection
from models.scorer import Head
from streaming.errors import ServiceError
from streaming.registry import Registry
from streaming.storage.files import list_array
from streaming.storage.registry_objects import Version, version_key
from streaming.storage.store import open_store
from streaming.training import gate
from streaming.training.fit_options import GateOptions
from streaming.training.gate import Paired, Verdict, confidence_of_look, decide, looks_at, pair, reject_costly_int8


def counts(only_candidate: int, only_champion: int, rows: int = 1000) -> Paired:
    found = PairedCounts(rows - only_candidate - only_champion, only_candidate, only_champion)
    return Paired(
        ACCURACY, found, MeanGain(np.array([1.0, -1, 0]), np.array([only_candidate, only_champion, found.both]), 1)
    )


@pytest.mark.parametrize(
    ("found", "margin", "promoted"),
    [
        (counts(60, 20), 0.0, True),
        (counts(60, 20), 0.05, False),  # better by 4 points, not by 5
        (counts(20, 60), 0.0, False),
        (counts(6, 5), 0.0, False),  # chance
        (counts(1, 0), 0.0, False),
        (counts(0, 0), 0.0, False),
        (counts(0, 0), -0.01, True),
        (counts(0, 0, 250), -0.01, False),  # 250 images cannot exclude a loss of one in a hundred
        (counts(6, 8), -0.02, True),  # no worse by more than two points
        (counts(6, 8), -0.005, False),
        (counts(0, 60), -0.02, False),
    ],
)
def test_candidate_is_promoted_only_for_a_significant_gain(found: Paired, margin: float, promoted: bool) -> None:
    verdict = decide(found, GateOptions(margin=margin))
    assert verdict.promote is promoted
    assert verdict.low is not None
    assert (verdict.low > margin) is promoted
    assert f"gain in accuracy {found.gain.value:+.4f} on the same {found.counts.rows:,} images" in verdict.why


def test_higher_confidence_requires_a_larger_gain() -> None:
    found = counts(30, 14)
    assert decide(found, GateOptions(confidence=0.9)).promote
    assert not decide(found, GateOptions(confidence=0.995)).promote


def test_verdict_estimates_the_images_needed() -> None:
    few = decide(counts(0, 0, 5), GateOptions(margin=-0.05))
    assert few.needed in {72, 73, 74}  # 0.95 ** 72 < 0.025
    assert f"may be worse by 0.0500; about {few.needed} images like these would show it" in few.why
    none = decide(counts(20, 60), GateOptions())
    assert none.needed is None
    assert "more images like these would not" in none.why
    assert decide(counts(60, 20), GateOptions()).needed is None


def test_each_look_at_the_holdout_raises_the_required_confidence() -> None:
    assert [round(confidence_of_look(0.95, look), 4) for look in (1, 2, 3)] == [0.975, 0.9917, 0.9958]
    verdicts = [decide(counts(30, 13), GateOptions(), look) for look in (1, 2, 6)]
    assert [verdict.promote for verdict in verdicts] == [True, True, False]
    assert "look" not in verdicts[0].why
    assert "comparison 2 on this holdout since the champion's promotion" in verdicts[1].why
    assert "for a new holdout, label more images and change --seed" in verdicts[2].why


def test_looks_count_later_versions_with_the_same_seed(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    registry = Registry(store)
    for version, seed in enumerate([7, 7, 42, 7, 7], start=1):
        stages = {name: StageEntry(kind="none", n_in=2, n_out=2) for name in ("projection", "classifier")}
        backbone = BackboneEntry(
            name="pixels", weights="none", input_size=(1, 1), scale=1, offset=0, n_features=2, parity=0
        )
        data = TrainingData(rows=version, holdout_rows=1, fingerprint="0" * 64, seed=seed)
        files = dict.fromkeys(
            ("backbone.tflite", "backbone.weights.h5", "projection.npz", "classifier.npz", "golden.npz"), "0" * 64
        )
        manifest = Manifest(
            backbone=backbone, classes=("a", "b"), metrics={}, training_data=data, libraries={}, files=files, **stages
        )
        text = manifest.model_dump_json(exclude_none=True).encode()
        registered = Version.of(hashlib.sha256(text).hexdigest())
        store.create(version_key(version), registered.to_bytes())
        store.create(f"models/{registered.path}/manifest.json", text)
    assert [looks_at(registry, champion, 7) for champion in (1, 2, 5)] == [3, 2, 0]
    assert looks_at(registry, 1, 42) == 1
    store.put(f"models/{registered.path}/manifest.json", b"{")  # version 5: unreadable, so it counts for every seed
    assert looks_at(registry, 2, 7) == 2
    assert looks_at(registry, 2, 42) == 2


def test_verdict_is_one_line_with_its_figures() -> None:
    better = decide(counts(60, 20), GateOptions())
    assert re.fullmatch(
        r"gain in accuracy \+0\.0400 on the same 1,000 images \(60 correct for the candidate only, 20 for the champion "
        r"only\), above \+0\.02\d\d with 0\.975 confidence: the candidate is better by more than 0\.0000",
        better.why,
    ), better.why
    assert (better.look, better.needed, better.confidence) == (1, None, pytest.approx(0.975))
    not_worse = decide(counts(20, 20), GateOptions(margin=-0.05))
    assert not_worse.why.endswith(": the candidate is not worse by 0.0500")
    unclear = decide(counts(6, 5), GateOptions(), look=2)
    assert unclear.needed is not None
    assert unclear.why.endswith(
        f": the candidate is not shown to be better by more than 0.0000; about {unclear.needed:,} images like these "
        "would show it; comparison 2 on this holdout since the champion's promotion, 0.95 confidence in total"
    )
    worse = decide(counts(5, 60), GateOptions(margin=-0.01), look=5)
    assert worse.needed is None
    assert "may be worse by 0.0100; more images like these would not; comparison 5 on this holdout" in worse.why
    assert worse.why.endswith("; for a new holdout, label more images and change --seed")
    assert "for a new holdout" not in decide(counts(5, 60), GateOptions(), look=4).why


def test_gain_is_promoted_exactly_if_its_bound_exceeds_the_margin() -> None:
    low = decide(counts(60, 20), GateOptions()).low
    assert low is not None
    assert decide(counts(60, 20), GateOptions(margin=low - 1e-4)).promote
    assert not decide(counts(60, 20), GateOptions(margin=low + 1e-4)).promote


def test_correct_answers_are_counted_per_model() -> None:
    rows = [
        Row(a=True, b=True, n=5),
        Row(a=True, b=False, n=3),
        Row(a=False, b=True, n=2),
        Row(a=False, b=False, n=7),
        Row(a=True, b=False, n=1),
    ]
    assert gate._counts(rows) == PairedCounts(both=5, only_candidate=4, only_champion=2, neither=7)
    assert Verdict(True, "the first model").look == 1


def test_empty_comparison_does_not_promote() -> None:
    verdict = decide(counts(0, 0, 0), GateOptions(margin=-0.9))
    assert not verdict.promote
    assert "nothing was compared" in verdict.why


@pytest.mark.parametrize(("cost", "promoted"), [(None, True), (-0.02, True), (0.01, True), (0.0101, False)])
def test_int8_that_costs_more_than_one_point_is_rejected(cost: float | None, promoted: bool) -> None:
    verdict = reject_costly_int8(Verdict(True, "the first model"), cost)
    assert verdict.promote is promoted
    assert verdict.why.endswith("the first model")


@pytest.mark.parametrize("values", [{"margin": np.inf}, {"margin": np.nan}, {"confidence": 0.4}, {"confidence": 1.0}])
def test_invalid_gate_options_are_rejected(values: dict[str, float]) -> None:
    with pytest.raises(ServiceError, match=r"got (inf|nan|1\.0|0\.4)"):
        GateOptions(**values)


# --- counting on the workers

CLASSES = ("a", "b", "c")


def permuted(order: list[int], width: int = 3) -> Head:
    """A model that predicts the class `order[i]` if feature i is the largest."""
    coefficients = np.zeros((3, width))
    coefficients[order, range(3)] = 1.0
    return Head(CLASSES, NoProjection(width), LogisticRegression(coefficients, np.zeros(3)))


@pytest.fixture(scope="module")
def rows(spark: SparkSession) -> Iterator[DataFrame]:
    """Thirty images, ten of each class; the largest feature is that of the class, except for two images of each."""
    truth = np.arange(30) % 3
    shown = np.where(np.arange(30) < 6, (truth + 1) % 3, truth)
    features = np.eye(3, dtype=np.float32)[shown]
    labels = [CLASSES[one] for one in truth]
    table = pa.table({"image_id": [f"{n}" for n in range(30)], "label": labels, "features": list_array(features)})
    frame = spark.createDataFrame(table).repartition(3).persist()
    yield frame
    frame.unpersist()


def paired_counts(*models: object) -> PairedCounts:
    return pair(*models).counts  # type: ignore[arg-type]


def test_answers_of_two_models_are_paired_by_image(rows: DataFrame) -> None:
    right, turned = permuted([0, 1, 2]), permuted([2, 0, 1])  # the second is right where the first is wrong
    assert paired_counts(right, rows, turned, rows) == PairedCounts(0, 24, 6, 0)
    assert paired_counts(right, rows, right, rows) == PairedCounts(24, 0, 0, 6)
    half = permuted([0, 1, 1])
    found = pair(half, rows, right, rows)
    assert found.counts == PairedCounts(16, 2, 8, 4)
    assert found.gain.value == pytest.approx(-6 / 30)


def test_models_with_different_backbones_are_compared_on_common_images(spark: SparkSession, rows: DataFrame) -> None:
    wide = spark.createDataFrame(
        pa.table({"image_id": ["7", "8", "99"], "label": ["x"] * 3, "features": list_array(np.eye(3, 5, dtype="f4"))})
    )
    found = pair(permuted([0, 1, 2]), rows, permuted([1, 2, 0], width=5), wide)
    # 7 is of class b and 8 of class c; the other model predicts b and c. The labels are those of the candidate's rows.
    assert found.counts == PairedCounts(2, 0, 0, 0)
    assert (found.gain.rows, found.gain.value) == (2, 0)


def test_macro_f1_gain_uses_the_true_label_and_both_answers(
    spark: SparkSession, rows: DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    half, right = permuted([0, 1, 1]), permuted([0, 1, 2])
    found = pair(half, rows, right, rows, Objective("macro_f1"))
    assert isinstance(found.gain, F1Gain)
    truth, shown = np.arange(30) % 3, np.where(np.arange(30) < 6, (np.arange(30) % 3 + 1) % 3, np.arange(30) % 3)
    by_hand = []
    for answers in (np.array([0, 1, 1])[shown], shown):
        hits = [2 * ((truth == one) & (answers == one)).sum() for one in range(3)]
        by_hand.append(np.mean([hit / ((truth == one).sum() + (answers == one).sum()) for one, hit in enumerate(hits)]))
    assert found.gain.value == pytest.approx(by_hand[0] - by_hand[1])
    assert found.counts == PairedCounts(16, 2, 8, 4)
    with pytest.raises(ModelError, match="--metric f1 requires two classes, got 3"):
        pair(half, rows, right, rows, Objective("f1"))
    monkeypatch.setattr(gate, "MAX_F1_IMAGES", 15)
    assert 5 < pair(half, rows, right, rows, Objective("macro_f1")).gain.rows < 25  # a sample, chosen by hash


@pytest.fixture(scope="module")
def two(spark: SparkSession) -> DataFrame:
    """Four images; their only feature is the log-odds of the second class."""
    odds = np.array([[-4.0], [-1.0], [1.0], [4.0]], np.float32)
    labels = ["no", "yes", "no", "other"]
    return spark.createDataFrame(pa.table({"image_id": list("0123"), "label": labels, "features": list_array(odds)}))


def head(threshold: float | None = None, slope: float = 1.0) -> Head:
    return Head(("no", "yes"), NoProjection(1), LogisticRegression(np.array([[0.0], [slope]]), np.zeros(2)), threshold)


def test_cost_gain_counts_misses_and_false_alarms(two: DataFrame) -> None:
    low, default = head(0.2), head()  # the low threshold finds the image at -1
    found = pair(low, two, default, two, Objective("cost", (1.0, 5.0)))
    assert found.gain.value == 5 / 4
    assert pair(low, two, head(0.9), two, Objective("cost", (1.0, 5.0))).gain.value == (5 - 1) / 4
    assert found.gain.most == 5
    assert found.counts == PairedCounts(both=1, only_candidate=1, neither=2)


def test_log_loss_gain_uses_the_true_label_and_is_bounded(two: DataFrame) -> None:
    def losses(slope: float) -> np.ndarray:
        chance = 1 / (1 + np.exp(-slope * np.array([-4.0, -1.0, 1.0])))
        of_true = np.append(np.where([False, True, False], chance, 1 - chance), 0.0)  # `other` is unknown to the model
        return -np.log(np.maximum(of_true, MIN_PROBABILITY))

    found = pair(head(slope=10.0), two, head(), two, Objective("log_loss"))
    assert found.gain.value == pytest.approx(np.mean(losses(1.0) - losses(10.0)), abs=1e-6)
    assert found.gain.lower_bound(0.9) < found.gain.value < 0
