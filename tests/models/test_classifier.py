"""Logistic regression in NumPy, compared with scikit-learn's `predict_proba` for the same coefficients."""

import numpy as np
import pytest
from samples import Digits
from sklearn.linear_model import LogisticRegression as ReferenceRegression

from models.classifier import LogisticRegression, classifier_from_arrays, softmax
from models.errors import ModelError


def test_probabilities_agree_with_scikit_learn(digits: Digits) -> None:
    features = digits.features[:, :40]
    reference = ReferenceRegression(max_iter=200).fit(features, digits.labels)
    ours = LogisticRegression(reference.coef_.astype(np.float64), reference.intercept_.astype(np.float64))
    got = ours.probabilities(features)
    assert (got.dtype, got.shape) == (np.float32, (len(features), 10))
    np.testing.assert_allclose(got, reference.predict_proba(features), atol=1e-5)
    np.testing.assert_allclose(got.sum(axis=1), 1.0, atol=1e-6)
    again = classifier_from_arrays("logistic_regression", 40, 10, ours.to_arrays())
    np.testing.assert_array_equal(again.probabilities(features), got)
    assert (again.n_in, again.n_classes) == (40, 10)


def test_probabilities_do_not_depend_on_the_rest_of_the_batch(digits: Digits) -> None:
    rng = np.random.default_rng(0)
    ours = LogisticRegression(rng.normal(size=(3, 1280)), rng.normal(size=3))
    together = ours.probabilities(digits.features[:9])
    for i in range(9):
        np.testing.assert_allclose(ours.probabilities(digits.features[i : i + 1])[0], together[i], rtol=1e-5)
    assert ours.probabilities(digits.features[:0]).shape == (0, 3)


def test_softmax_of_large_logits_neither_overflows_nor_divides_by_zero() -> None:
    with np.errstate(over="raise", divide="raise", invalid="raise"):
        got = softmax(np.array([[1e4, 1e4, -1e4], [-1e308, 0.0, -5e307]]))
    np.testing.assert_allclose(got, [[0.5, 0.5, 0.0], [0.0, 1.0, 0.0]])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"coefficients": np.zeros((3, 5))}, r"'coefficients' should be float64 of shape \(3, 4\)"),
        ({"coefficients": np.zeros((3, 4), np.float32)}, "'coefficients' should be float64 .* got float32"),
        ({"intercept": np.zeros(2)}, "'intercept' should be float64"),
        ({"intercept": np.array([0, np.nan, 0])}, "'intercept' contains NaN or infinite"),
        ({"coefficients": np.full((3, 4), -np.inf)}, "'coefficients' contains NaN or infinite"),
    ],
)
def test_invalid_classifier_arrays_are_rejected(change: dict[str, np.ndarray], reason: str) -> None:
    arrays = {"coefficients": np.zeros((3, 4)), "intercept": np.zeros(3)}
    assert classifier_from_arrays("logistic_regression", 4, 3, arrays).n_classes == 3
    with pytest.raises(ModelError, match=reason):
        classifier_from_arrays("logistic_regression", 4, 3, arrays | change)
    with pytest.raises(ModelError, match="is missing"):
        classifier_from_arrays("logistic_regression", 4, 3, {name: arrays[name] for name in arrays if name in change})


def test_unknown_classifier_error_names_the_known_one() -> None:
    with pytest.raises(ModelError, match="unknown classifier 'forest', expected one of: logistic_regression"):
        classifier_from_arrays("forest", 4, 3, {})


def test_network_outputs_pass_through_as_logits_or_probabilities() -> None:
    logits = np.random.default_rng(0).normal(0, 3, (20, 4)).astype(np.float32)
    expected = softmax(logits)
    for kind, scores in (("logits", logits), ("probabilities", expected), ("probabilities", 0.996 * expected)):
        head = classifier_from_arrays(kind, 4, 4, {})
        np.testing.assert_allclose(head.probabilities(scores), expected, atol=1e-6)
        np.testing.assert_allclose(softmax(head.logits(scores)), expected, atol=1e-6)
    assert (classifier_from_arrays("probabilities", 4, 4, {}).probabilities(np.eye(4, dtype=np.float32)) >= 0).all()


def test_single_output_is_the_score_of_the_second_class() -> None:
    z = np.array([[-2.0], [0.0], [3.0]], np.float32)
    second = 1 / (1 + np.exp(-z[:, 0]))
    for kind, scores in (("logits", z), ("probabilities", second[:, np.newaxis])):
        np.testing.assert_allclose(
            classifier_from_arrays(kind, 1, 2, {}).probabilities(scores)[:, 1], second, atol=1e-6
        )
    with pytest.raises(ModelError, match="3 scores do not match 2 classes"):
        classifier_from_arrays("logits", 3, 2, {})
