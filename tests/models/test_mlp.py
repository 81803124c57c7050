import numpy as np
import pytest

from models.classifier import MAX_LAYERS, classifier_from_arrays, mlp_from_spark
from models.errors import ModelError


def test_mlp_matches_a_computation_by_hand() -> None:
    # Two features, two hidden units, two classes. Spark stores the matrix (out x in) column by column: the weights
    # of the first feature, then those of the second, then the biases.
    from_first, from_second, bias = [1.0, -1.0], [2.0, 0.0], [0.0, 3.0]
    top_first, top_second, top_bias = [4.0, 0.0], [0.0, 1.0], [-1.0, 0.5]
    flat = np.array([*from_first, *from_second, *bias, *top_first, *top_second, *top_bias])
    mlp = mlp_from_spark([2, 2, 2], flat)

    first = 1 / (1 + np.exp(-(0.5 * 1 + 0.25 * 2 + 0)))  # the hidden units for the features (0.5, 0.25)
    second = 1 / (1 + np.exp(-(0.5 * -1 + 0.25 * 0 + 3)))
    a, b = 4 * first - 1, 1 * second + 0.5
    expected = np.exp([a, b]) / (np.exp(a) + np.exp(b))

    got = mlp.probabilities(np.array([[0.5, 0.25]], np.float32))[0]
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    np.testing.assert_array_equal(mlp.weights[0], [from_first, from_second])
    np.testing.assert_array_equal(mlp.biases[0], bias)


def test_mlp_matches_scikit_learn() -> None:
    from sklearn.datasets import load_digits
    from sklearn.neural_network import MLPClassifier

    digits = load_digits()
    rows = (digits.data / 16).astype(np.float32)
    fitted = MLPClassifier(
        (24, 16), activation="logistic", max_iter=200, random_state=0, learning_rate_init=0.02, tol=1e-2
    )
    fitted.fit(rows.astype(np.float64), digits.target)
    assert fitted.score(rows, digits.target) > 0.9
    layers = zip(fitted.coefs_, fitted.intercepts_, strict=True)
    flat = np.concatenate([part for weights, bias in layers for part in (weights.ravel(), bias)])
    mlp = mlp_from_spark([64, 24, 16, 10], flat)
    np.testing.assert_allclose(mlp.probabilities(rows), fitted.predict_proba(rows.astype(np.float64)), atol=1e-6)


@pytest.mark.parametrize(
    ("layers", "n_weights"), [([3, 2], 7), ([3, 2], 9), ([3], 0), ([], 0), ([3, 0, 2], 2)], ids=str
)
def test_weights_that_do_not_match_the_layers_are_rejected(layers: list[int], n_weights: int) -> None:
    with pytest.raises(ModelError, match="an MLP of layers"):
        mlp_from_spark(layers, np.zeros(n_weights))


def test_non_finite_weights_are_rejected() -> None:
    with pytest.raises(ModelError, match="NaN or infinite"):
        mlp_from_spark([3, 2], np.full(8, np.nan))


@pytest.mark.parametrize("names", [[], ["weights_0"], ["weights_0", "bias_1"], ["a", "b"]], ids=str)
def test_wrongly_named_arrays_are_rejected(names: list[str]) -> None:
    with pytest.raises(ModelError, match=r"an MLP has weights|is missing"):
        classifier_from_arrays("mlp", 2, 2, {name: np.zeros((2, 2)) for name in names})


def test_too_many_layers_are_rejected() -> None:
    arrays = {f"{part}_{i}": np.zeros(1) for i in range(MAX_LAYERS + 1) for part in ("weights", "bias")}
    with pytest.raises(ModelError, match=f"1 to {MAX_LAYERS} layers"):
        classifier_from_arrays("mlp", 1, 1, arrays)
