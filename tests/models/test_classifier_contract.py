"""Properties that hold for every classifier."""

import numpy as np
import pytest

from models.arrays import read_npz, write_npz
from models.classifier import Classifier, LogisticRegression, classifier_from_arrays, mlp_from_spark
from models.errors import ModelError

N_IN, N_CLASSES = 12, 4


def _classifiers() -> dict[str, Classifier]:
    rng = np.random.default_rng(0)
    flat = rng.normal(size=(N_IN + 1) * 7 + (7 + 1) * 5 + (5 + 1) * N_CLASSES)
    return {
        "logistic regression": LogisticRegression(rng.normal(size=(N_CLASSES, N_IN)), rng.normal(size=N_CLASSES)),
        "mlp of one layer": mlp_from_spark([N_IN, N_CLASSES], flat[: (N_IN + 1) * N_CLASSES]),
        "mlp of three layers": mlp_from_spark([N_IN, 7, 5, N_CLASSES], flat),
    }


@pytest.fixture(params=_classifiers())
def classifier(request: pytest.FixtureRequest) -> Classifier:
    return _classifiers()[request.param]


@pytest.fixture
def features() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(40, N_IN)).astype(np.float32)


def test_rows_are_probabilities_over_all_classes(classifier: Classifier, features: np.ndarray) -> None:
    probabilities = classifier.probabilities(features)
    assert (classifier.n_in, classifier.n_classes) == (N_IN, N_CLASSES)
    assert (probabilities.shape, probabilities.dtype) == ((40, N_CLASSES), np.float32)
    assert (probabilities >= 0).all()
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-6)
    assert len(np.unique(probabilities.argmax(axis=1))) > 1
    assert classifier.probabilities(features[:0]).shape == (0, N_CLASSES)


def test_rows_are_independent_and_features_are_not_modified(classifier: Classifier, features: np.ndarray) -> None:
    before = features.copy()
    features.flags.writeable = False
    together = classifier.probabilities(features)
    np.testing.assert_array_equal(classifier.probabilities(features[::-1])[::-1], together)
    for count in (1, 3, 16, 33):  # BLAS has different kernels for different numbers of rows
        np.testing.assert_array_equal(classifier.probabilities(features[3 : 3 + count]), together[3 : 3 + count])
    np.testing.assert_array_equal(features, before)


def test_features_of_any_magnitude_give_finite_probabilities(classifier: Classifier, features: np.ndarray) -> None:
    with np.errstate(over="raise", invalid="raise"):
        for scale in (1e-30, 1e4, 1e30):
            probabilities = classifier.probabilities(features * np.float32(scale))
            assert np.isfinite(probabilities).all()
            np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-6)


def test_classifier_round_trips_through_npz(classifier: Classifier, features: np.ndarray) -> None:
    stored = read_npz(write_npz(classifier.to_arrays()), "classifier.npz")
    again = classifier_from_arrays(classifier.kind, N_IN, N_CLASSES, stored)
    assert (again.kind, again.n_in, again.n_classes) == (classifier.kind, N_IN, N_CLASSES)
    np.testing.assert_array_equal(again.probabilities(features), classifier.probabilities(features))


def test_incompatible_arrays_are_rejected(classifier: Classifier) -> None:
    arrays = classifier.to_arrays()
    for n_in, n_classes in ((N_IN + 1, N_CLASSES), (N_IN, N_CLASSES + 1)):
        with pytest.raises(ModelError, match="should be float64 of shape"):
            classifier_from_arrays(classifier.kind, n_in, n_classes, arrays)
    for name, array in arrays.items():
        with pytest.raises(ModelError, match=r"is missing|got"):
            classifier_from_arrays(classifier.kind, N_IN, N_CLASSES, {k: a for k, a in arrays.items() if k != name})
        for invalid in (np.full_like(array, np.nan), array.astype(np.float32), array[np.newaxis]):
            with pytest.raises(ModelError, match=f"array '{name}'"):
                classifier_from_arrays(classifier.kind, N_IN, N_CLASSES, arrays | {name: invalid})
