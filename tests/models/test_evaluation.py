"""Evaluation metrics compared with scikit-learn's, on predictions of real models for digits."""

import numpy as np
import pytest
from scipy.special import log_softmax, logsumexp
from sklearn import metrics
from sklearn.calibration import calibration_curve
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.naive_bayes import GaussianNB

from models.classifier import softmax
from models.errors import ModelError
from models.evaluation import CONFIDENCE_BINS, Evaluation
from models.evaluation_sums import EvaluationSums

CLASSES = tuple("0123456789")


def digits() -> tuple[np.ndarray, np.ndarray]:
    pixels, truth = load_digits(return_X_y=True)
    return pixels / 16, truth.astype(np.int64)


def logits_of(kind: str) -> tuple[np.ndarray, np.ndarray]:
    """(logits, truth) of the second half of the digits, from a model fitted on the first half."""
    pixels, truth = digits()
    half = len(truth) // 2
    if kind == "overconfident":  # naive Bayes: probabilities of exactly 0 and 1
        fitted = GaussianNB(var_smoothing=1e-3).fit(pixels[:half], truth[:half])
        return fitted.predict_joint_log_proba(pixels[half:]), truth[half:]
    strength = {"good": 1.0, "unsure": 1e-3, "nearly random": 1e-5}[kind]
    fitted = LogisticRegression(C=strength, max_iter=300).fit(pixels[:half], truth[:half])
    return fitted.decision_function(pixels[half:]), truth[half:]


def sums_of(logits: np.ndarray, truth: np.ndarray, classes: tuple[str, ...] = CLASSES) -> EvaluationSums:
    sums = EvaluationSums(classes, logits.shape[1])
    sums.add(logits, truth)
    return sums


@pytest.fixture(scope="module", params=["good", "unsure", "nearly random", "overconfident"])
def answers(request: pytest.FixtureRequest) -> tuple[np.ndarray, np.ndarray]:
    return logits_of(request.param)


@pytest.fixture
def found(answers: tuple[np.ndarray, np.ndarray]) -> Evaluation:
    return sums_of(*answers).result()


def log_odds(logits: np.ndarray) -> np.ndarray:
    """Log-odds of each class: they order rows as its probabilities do, but without ties at 0 and 1."""
    others = [logsumexp(np.delete(logits, index, axis=1), axis=1) for index in range(logits.shape[1])]
    return logits - np.stack(others, axis=1)


# --- against scikit-learn


def test_confusion_precision_recall_and_f1_match_scikit_learn(
    answers: tuple[np.ndarray, np.ndarray], found: Evaluation
) -> None:
    logits, truth = answers
    predicted = logits.argmax(axis=1)
    np.testing.assert_array_equal(found.confusion, metrics.confusion_matrix(truth, predicted))
    assert found.accuracy == pytest.approx(metrics.accuracy_score(truth, predicted))
    per_class = metrics.precision_recall_fscore_support(truth, predicted, zero_division=0)
    for ours, theirs in zip((found.precision, found.recall, found.f1, found.support), per_class, strict=True):
        np.testing.assert_allclose(ours, theirs)
    for average, mean in (("macro", found.macro), ("weighted", found.weighted)):
        figures = metrics.precision_recall_fscore_support(truth, predicted, average=average, zero_division=0)
        assert [mean(found.precision), mean(found.recall), mean(found.f1)] == pytest.approx(figures[:3])


def test_log_loss_matches_scikit_learn_and_is_not_clipped_from_logits(
    answers: tuple[np.ndarray, np.ndarray], found: Evaluation
) -> None:
    logits, truth = answers
    served = softmax(logits).astype(np.float64)
    clipped = np.clip(served, 1e-15, 1)
    theirs = metrics.log_loss(truth, clipped / clipped.sum(axis=1, keepdims=True))
    assert found.log_loss == pytest.approx(theirs, rel=1e-5)
    exact = -log_softmax(logits, axis=1)[np.arange(len(truth)), truth].mean()
    assert found.log_loss_from_logits == pytest.approx(exact, rel=1e-6)


def test_auc_and_roc_curves_match_scikit_learn(answers: tuple[np.ndarray, np.ndarray], found: Evaluation) -> None:
    logits, truth = answers
    for average, ours in (("macro", found.macro_auc), ("weighted", found.weighted_auc)):
        theirs = metrics.roc_auc_score(np.eye(10)[truth], log_odds(logits), average=average)
        assert ours == pytest.approx(theirs, abs=1e-3)
    for index in range(10):
        theirs = metrics.roc_auc_score(truth == index, log_odds(logits)[:, index])
        assert found.auc[index] == pytest.approx(theirs, abs=1e-3)
        false, true = found.roc_curve(index)
        assert (false[0], true[0], false[-1], true[-1]) == (0, 0, 1, 1)
        assert metrics.auc(false, true) == pytest.approx(found.auc[index])


def test_reliability_and_calibration_error_match_scikit_learn(
    answers: tuple[np.ndarray, np.ndarray], found: Evaluation
) -> None:
    logits, truth = answers
    probabilities = softmax(logits).astype(np.float64)
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == truth
    share, mean = calibration_curve(right, np.minimum(confidence, 1.0), n_bins=CONFIDENCE_BINS)
    ours_mean, ours_share, rows = found.reliability_curve()
    np.testing.assert_allclose(ours_mean, mean, atol=1e-6)
    np.testing.assert_allclose(ours_share, share, atol=1e-12)
    assert found.calibration_error == pytest.approx(np.average(np.abs(share - mean), weights=rows), abs=1e-6)


# --- merging


def test_partial_sums_merge_to_the_whole_in_any_order() -> None:
    logits, truth = (np.tile(array, (8, 1)[: array.ndim]) for array in logits_of("unsure"))
    # More distinct scores than the histogram holds.
    logits += np.random.default_rng(0).normal(scale=0.01, size=logits.shape)
    whole = sums_of(logits, truth)
    parts = [sums_of(logits[part], truth[part]) for part in np.array_split(np.arange(len(truth)), 7)]
    assert whole.scores.dropped > 0
    for order in (parts, parts[::-1]):
        merged = EvaluationSums(CLASSES, 10)
        for part in order:
            merged.merge(EvaluationSums.from_bytes(CLASSES, 10, part.to_bytes()))
        assert merged.to_bytes() == whole.to_bytes()


@pytest.mark.parametrize(("centre", "spread"), [(0, 1e-3), (-3, 1e-2), (0, 1), (0, 100)])
def test_compressed_roc_auc_stays_within_a_thousandth(centre: float, spread: float) -> None:
    generator = np.random.default_rng(0)
    truth = generator.integers(0, 2, 60_000)
    logits = np.stack([np.zeros(60_000), centre + spread * (truth + generator.normal(size=60_000))], axis=1)
    sums = EvaluationSums(("a", "b"), 2)
    for part in np.array_split(np.arange(60_000), 100):
        sums.add(logits[part], truth[part])
    assert len(sums.to_bytes()) < 2 * 4096 * 3 * 8 + 1000
    theirs = metrics.roc_auc_score(truth, logits[:, 1])
    assert sums.result().auc == pytest.approx([theirs, theirs], abs=1e-3)


def test_mismatched_classes_and_out_of_range_indices_are_rejected() -> None:
    sums = EvaluationSums(("a", "b"), 2)
    with pytest.raises(ModelError, match="bytes cannot be sums over 3 classes"):
        EvaluationSums.from_bytes(("a", "b", "c"), 3, sums.to_bytes())
    with pytest.raises(ModelError, match="only sums of the same classes can be merged"):
        sums.merge(EvaluationSums(("a", "c"), 2))
    with pytest.raises(ModelError, match="classes are numbered 0 to 1, got 0…2"):
        sums.add(np.zeros((2, 2)), np.array([0, 2]))
    with pytest.raises(ModelError, match=r"expected finite logits of shape \(2, 2\), got \(2, 3\)"):
        sums.add(np.zeros((2, 3)), np.array([0, 1]))
    with pytest.raises(ModelError, match="finite"):
        sums.add(np.full((2, 2), np.nan), np.array([0, 1]))
    with pytest.raises(ModelError, match="a model of 3 outputs"):
        EvaluationSums(("a", "b"), 3)


# --- edge cases


def test_logits_of_any_magnitude_give_finite_metrics() -> None:
    logits = np.array([[1000.0, 0.0], [0.0, 1000.0], [-1e300, 0.0], [5.0, 5.0]])
    found = sums_of(logits, np.array([0, 0, 0, 1]), ("a", "b")).result()
    assert found.log_loss == pytest.approx((0 + 2 * -np.log(1e-15) + np.log(2)) / 4, rel=1e-6)
    assert found.log_loss_from_logits == pytest.approx((0 + 1000 + 10_000 + np.log(2)) / 4, rel=1e-6)
    assert all(np.isfinite(value) for value in found.as_metrics().values())


def test_class_unknown_to_the_model_counts_as_errors_and_has_no_roc_curve() -> None:
    logits = np.array([[2.0, 1.0], [1.0, 2.0], [3.0, 0.0]])
    found = sums_of(logits, np.array([0, 1, 2]), ("a", "b", "new")).result()
    assert (found.rows, found.correct) == (3, 2)
    assert found.confusion[2].tolist() == [1, 0, 0]
    assert np.isnan(found.auc[2])
    assert found.auc[0] == 0.5  # the image of the new class has a higher score for `a` than the `a` itself
    assert found.log_loss > 10


def test_answers_without_logits_give_counts_and_calibration_only() -> None:
    logits, truth = logits_of("good")
    probabilities = softmax(logits)
    whole, sums = sums_of(logits, truth).result(), EvaluationSums(CLASSES, 10)
    sums.add_answers(probabilities.argmax(axis=1), probabilities.max(axis=1), truth)
    found = sums.result()
    unknown = {"log_loss", "log_loss_from_logits", "macro_auc", "weighted_auc"}
    assert found.as_metrics() == {name: value for name, value in whole.as_metrics().items() if name not in unknown}
    assert np.isnan([found.log_loss, found.macro_auc]).all()


def test_empty_evaluation_has_defined_metrics() -> None:
    found = EvaluationSums(CLASSES, 10).result()
    assert (found.rows, found.accuracy, found.macro_f1, found.log_loss) == (0, 0.0, 0.0, 0.0)
    assert found.accuracy_interval() == found.macro_f1_interval() == (0.0, 1.0)
    assert all(np.isfinite(value) for value in found.as_metrics().values())


# --- intervals


def test_wilson_interval_matches_the_textbook() -> None:
    found = Evaluation(("a", "b"), np.array([[45, 5], [5, 45]]))
    # 90 of 100 at 95 %: 0.8256 … 0.9448 (Newcombe 1998, Statistics in Medicine 17, table I's method 3)
    assert found.accuracy_interval() == pytest.approx((0.8256, 0.9448), abs=1e-4)
    low, high = found.accuracy_interval(0.99)
    assert low < 0.8256
    assert high > 0.9448


def test_macro_f1_interval_matches_the_bootstrap_for_many_rows() -> None:
    logits, truth = logits_of("unsure")
    predicted = logits.argmax(axis=1)
    generator = np.random.default_rng(1)
    drawn = (generator.integers(0, len(truth), len(truth)) for _ in range(400))
    theirs = [metrics.f1_score(truth[rows], predicted[rows], average="macro") for rows in drawn]
    low, high = sums_of(logits, truth).result().macro_f1_interval()
    assert high - low == pytest.approx(np.subtract(*np.quantile(theirs, [0.975, 0.025])), rel=0.1)
    assert low < np.mean(theirs) < high
