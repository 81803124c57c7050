import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from models.classifier import answers_of, softmax
from models.errors import ModelError
from models.evaluation_sums import EvaluationSums
from models.score_histogram import ScoreHistogram
from models.threshold import best_threshold
from models.threshold_aim import ThresholdAim, parse_threshold

F1 = ThresholdAim()


def logits_of(odds: np.ndarray) -> np.ndarray:
    """Logits of two classes; the second class has these log-odds."""
    return np.stack([np.zeros_like(odds), odds], axis=1)


def histogram_of(odds: np.ndarray, truth: np.ndarray) -> ScoreHistogram:
    sums = EvaluationSums(("no", "yes"), 2)
    sums.add(logits_of(odds), truth)
    return sums.scores


def answered(odds: np.ndarray, threshold: float | None) -> np.ndarray:
    return answers_of(softmax(logits_of(odds)), threshold)


def samples(n: int, members: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(log-odds, truth) of an underconfident model: members of the second class score higher, but all score low."""
    generator = np.random.default_rng(seed)
    truth = (generator.random(n) < members).astype(np.int64)
    return generator.normal(2.0 * truth - 3.0, 1.0), truth


@pytest.mark.parametrize(
    ("text", "aim"),
    [
        ("f1", ThresholdAim()),
        (" F1 ", ThresholdAim()),
        ("0.7", ThresholdAim(fixed=0.7)),
        ("cost:1:5", ThresholdAim(costs=(1.0, 5.0))),
        ("cost:0.5:1e3", ThresholdAim(costs=(0.5, 1000.0))),
    ],
)
def test_threshold_aim_is_parsed(text: str, aim: ThresholdAim) -> None:
    assert parse_threshold(text) == aim


@pytest.mark.parametrize(
    "text",
    ["", "0", "1", "-0.2", "nan", "f2", "f1:2", "cost", "cost:1", "cost:0:1", "cost:1:inf", "cost:1:2:3", "0.5:1"],
)
def test_invalid_threshold_aim_is_rejected(text: str) -> None:
    with pytest.raises(ModelError, match="a threshold between 0 and 1, f1, or cost:FP:FN"):
        parse_threshold(text)


def test_best_f1_threshold_matches_an_exhaustive_search() -> None:
    odds, truth = samples(400, 0.2, seed=1)
    threshold = best_threshold(histogram_of(odds, truth), F1)
    reached = f1_score(truth, answered(odds, threshold))
    probabilities = softmax(logits_of(odds))[:, 1]
    assert reached == pytest.approx(max(f1_score(truth, probabilities >= one) for one in probabilities), abs=1e-12)
    assert reached > f1_score(truth, answered(odds, None)) + 0.2


@given(
    st.lists(st.tuples(st.floats(-200, 200), st.booleans()), min_size=2, max_size=12).filter(
        lambda rows: len({truth for _, truth in rows}) == 2
    ),
    st.floats(0.1, 10),
)
def test_no_threshold_costs_less_than_the_chosen_one(rows: list[tuple[float, bool]], miss: float) -> None:
    odds, truth = np.array([one for one, _ in rows]), np.array([truth for _, truth in rows]).astype(np.int64)

    def cost(threshold: float) -> float:
        answers = answered(odds, threshold)
        return float(np.sum(answers > truth) + miss * np.sum(answers < truth))

    found = best_threshold(histogram_of(odds, truth), ThresholdAim(costs=(1.0, miss)))
    assert 0 < found < 1
    probabilities = softmax(logits_of(odds))[:, 1].astype(np.float64)
    tried = [1e-60, 1 - 1e-15, *(one for one in (*probabilities, *np.nextafter(probabilities, 2)) if 0 < one < 1)]
    assert cost(found) <= min(map(cost, tried)) + 1e-9


def test_expensive_misses_lower_the_threshold_and_false_alarms_raise_it() -> None:
    odds, truth = samples(2_000, 0.3, seed=2)
    scores = histogram_of(odds + 2, truth)  # now they are calibrated
    low, middle, high = (best_threshold(scores, ThresholdAim(costs=costs)) for costs in ((1, 9), (1, 1), (9, 1)))
    assert low < 0.4 < middle < 0.75 < high


def test_threshold_stays_at_one_half_if_optimal() -> None:
    scores = histogram_of(np.array([-3.0, -1.0, 2.0, 4.0]), np.array([0, 0, 1, 1]))
    assert best_threshold(scores, F1) == 0.5
    assert best_threshold(scores, ThresholdAim(fixed=0.9)) == 0.9


def test_merged_and_compressed_scores_give_the_same_threshold() -> None:
    odds, truth = samples(30_000, 0.2, seed=3)
    whole, parts = histogram_of(odds, truth), [histogram_of(odds[i::7], truth[i::7]) for i in range(7)]
    merged = ScoreHistogram(2)
    for part in reversed(parts):
        merged.merge(part)
    threshold = best_threshold(whole, F1)
    assert whole.dropped > 0
    assert best_threshold(merged, F1) == threshold
    probabilities = softmax(logits_of(odds))[:, 1]
    best = max(f1_score(truth, probabilities >= one) for one in np.quantile(probabilities, np.linspace(0.5, 0.99, 99)))
    assert f1_score(truth, answered(odds, threshold)) > best - 1e-3


def test_threshold_without_both_classes_is_rejected() -> None:
    with pytest.raises(ModelError, match="rows of both classes, got 0 of the second and 2 others"):
        best_threshold(histogram_of(np.array([0.1, 0.2]), np.array([0, 0])), F1)
    with pytest.raises(ModelError, match="got 0 of the second and 0 others"):
        best_threshold(ScoreHistogram(2), F1)
    with pytest.raises(ModelError, match="requires two classes, got 3"):
        best_threshold(ScoreHistogram(3), F1)


def test_answers_follow_the_threshold_or_the_most_probable_class() -> None:
    probabilities = np.array([[0.5, 0.5], [0.25, 0.75], [0.75, 0.25]], np.float32)
    assert answers_of(probabilities).tolist() == [0, 1, 0]
    assert answers_of(probabilities, 0.5).tolist() == [1, 1, 0]
    assert answers_of(probabilities, 0.25).tolist() == [1, 1, 1]
    assert answers_of(probabilities, 0.8).tolist() == [0, 0, 0]
    assert answers_of(np.array([[0.1, 0.2, 0.7]], np.float32)).tolist() == [2]
