"""PCA from accumulated sums, compared with scikit-learn's on real features."""

import numpy as np
import pytest
from samples import Digits
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA as ReferencePCA  # noqa: N811

from models.arrays import Features
from models.errors import ModelError
from models.projection import PCA, GramSums, NoProjection, fit_pca, projection_from_arrays


def sums_of(rows: Features) -> GramSums:
    sums = GramSums(rows.shape[1])
    sums.add(rows)
    return sums


@pytest.fixture(scope="module")
def pixels() -> Features:
    """(1797, 64) grey values 0..16; three of the columns are constant."""
    return load_digits().data.astype(np.float32)


@pytest.fixture(params=["more rows than features", "fewer rows than features"])
def rows(request: pytest.FixtureRequest, pixels: Features, digits: Digits) -> Features:
    return pixels if request.param == "more rows than features" else digits.features


def test_pca_agrees_with_scikit_learn_up_to_sign(rows: Features) -> None:
    pca = fit_pca(sums_of(rows), 0.9)
    reference = ReferencePCA(0.9, svd_solver="full").fit(rows.astype(np.float64))
    k = reference.n_components_
    assert (pca.n_in, pca.n_out) == (rows.shape[1], k)
    np.testing.assert_allclose(pca.mean, reference.mean_, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(pca.explained_variance_ratio[:k], reference.explained_variance_ratio_, rtol=1e-5)
    signs = np.sign(np.sum(pca.components * reference.components_, axis=1))
    np.testing.assert_allclose(pca.components * signs[:, None], reference.components_, atol=1e-6)
    scale = np.abs(rows).max()
    expected = reference.transform(rows.astype(np.float64)) * signs
    np.testing.assert_allclose(pca.transform(rows), expected, atol=5e-6 * scale)


def test_explained_variance_ratios_decrease_and_sum_to_one(rows: Features) -> None:
    ratio = fit_pca(sums_of(rows), 0.5).explained_variance_ratio
    assert ratio.shape == (rows.shape[1],)
    assert (np.diff(ratio) <= 0).all()
    assert (ratio >= 0).all()
    assert ratio.sum(dtype=np.float64) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("target", [0.01, 0.5, 0.9, 0.99])
def test_pca_keeps_the_fewest_components_that_reach_the_target(pixels: Features, target: float) -> None:
    pca = fit_pca(sums_of(pixels), target)
    cumulative = np.cumsum(pca.explained_variance_ratio, dtype=np.float64)
    assert cumulative[pca.n_out - 1] >= target
    assert pca.n_out == 1 or cumulative[pca.n_out - 2] < target
    assert pca.n_out == ReferencePCA(target, svd_solver="full").fit(pixels).n_components_


def test_components_are_orthonormal_and_their_largest_entry_is_positive(rows: Features) -> None:
    components = fit_pca(sums_of(rows), 0.9).components
    np.testing.assert_allclose(components @ components.T, np.eye(len(components)), atol=1e-5)
    assert (components[np.arange(len(components)), np.abs(components).argmax(axis=1)] > 0).all()


def test_merged_partial_sums_equal_one_pass(rows: Features) -> None:
    merged = GramSums(rows.shape[1])
    for part in np.array_split(rows, 7):
        merged.merge(sums_of(part))
    whole = sums_of(rows)
    assert merged.n == whole.n == len(rows)
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-12)
    np.testing.assert_allclose(merged.scatter, whole.scatter, rtol=1e-11, atol=1e-9)
    for name, array in fit_pca(merged).to_arrays().items():
        np.testing.assert_allclose(array, fit_pca(whole).to_arrays()[name], rtol=1e-5, atol=1e-6)


def test_fitting_does_not_modify_rows_or_sums(pixels: Features) -> None:
    before = pixels.copy()
    sums = sums_of(pixels)
    pca = fit_pca(sums)
    pca.transform(pixels)
    np.testing.assert_array_equal(pixels, before)
    assert fit_pca(sums).to_arrays().keys() == pca.to_arrays().keys()
    np.testing.assert_array_equal(fit_pca(sums).components, pca.components)


def test_target_of_all_variance_keeps_at_most_the_rank(pixels: Features, digits: Digits) -> None:
    assert fit_pca(sums_of(pixels), 1.0).n_out == np.linalg.matrix_rank(np.cov(pixels.T)) == 61
    assert fit_pca(sums_of(digits.features), 1.0).n_out == len(digits.features) - 1
    twice = np.repeat(pixels[:10], 5, axis=0)
    assert fit_pca(sums_of(twice), 1.0).n_out == 9


def test_k_can_replace_the_variance_target(pixels: Features) -> None:
    assert fit_pca(sums_of(pixels), k=61).n_out == 61
    assert fit_pca(sums_of(pixels), explained_variance=None, k=1).n_out == 1


@pytest.mark.parametrize("k", [-1, 0, 62, 64, 65])
def test_k_beyond_the_rank_is_rejected(pixels: Features, k: int) -> None:
    with pytest.raises(ModelError, match=rf"k must be from 1 to 61, the rank of the features, got {k}"):
        fit_pca(sums_of(pixels), k=k)


@pytest.mark.parametrize("target", [None, -0.1, 0.0, 1.0001, float("nan")])
def test_invalid_variance_target_is_rejected(pixels: Features, target: float | None) -> None:
    with pytest.raises(ModelError, match="explained variance must be above 0 and at most 1, got"):
        fit_pca(sums_of(pixels), target)


@pytest.mark.parametrize("n", [0, 1])
def test_too_few_rows_are_rejected(pixels: Features, n: int) -> None:
    with pytest.raises(ModelError, match=f"at least 2 rows with features, got {n}"):
        fit_pca(sums_of(pixels[:n]))


@pytest.mark.parametrize("value", [0.0, 0.1, 1e6], ids=["zeros", "a value that is rounded", "a large value"])
def test_equal_rows_are_rejected(value: float) -> None:
    with pytest.raises(ModelError, match="features that vary; all 37 rows are equal"):
        fit_pca(sums_of(np.full((37, 5), value, np.float32)))


def test_rounding_error_is_not_taken_for_variance() -> None:
    rng = np.random.default_rng(0)
    for n in (2, 55, 83, 1000):  # the sum of most such rows differs from n times one row
        with pytest.raises(ModelError, match=f"all {n} rows are equal"):
            fit_pca(sums_of(np.tile(rng.normal(size=8).astype(np.float32), (n, 1))))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_features_are_rejected(pixels: Features, value: float) -> None:
    invalid = pixels.copy()
    invalid[3, 4] = value
    with pytest.raises(ModelError, match="finite features; some are NaN or infinite"):
        fit_pca(sums_of(invalid))


def test_small_variance_around_a_large_mean_is_detected() -> None:
    rows = (1000 + np.random.default_rng(0).normal(0, 0.01, (500, 4))).astype(np.float32)
    reference = ReferencePCA(svd_solver="full").fit(rows.astype(np.float64))
    pca = fit_pca(sums_of(rows), k=4)
    np.testing.assert_allclose(pca.explained_variance_ratio, reference.explained_variance_ratio_, rtol=1e-4)


def skewed(seed: int = 0, n: int = 2000) -> Features:
    """(n, 8) columns of unit variance; the mean of one of them is 3e4."""
    rows = np.random.default_rng(seed).normal(size=(n, 8))
    rows[:, 3] += 3e4
    return rows.astype(np.float32)


def test_large_mean_in_one_column_does_not_hide_the_variance_of_others() -> None:
    rows = skewed()
    reference = ReferencePCA(svd_solver="full").fit(rows.astype(np.float64))
    pca = fit_pca(sums_of(rows), 1.0)
    assert pca.n_out == reference.n_components_ == 8  # a cut-off by the uncentred sums would keep 1
    np.testing.assert_allclose(pca.explained_variance_ratio, reference.explained_variance_ratio_, rtol=1e-5)
    signs = np.sign(np.sum(pca.components * reference.components_, axis=1))
    np.testing.assert_allclose(pca.components * signs[:, None], reference.components_, atol=1e-5)


@pytest.mark.parametrize("mean", [1e3, 1e5, 1e6])
def test_variance_about_a_large_mean_stays_precise_merged_or_not(mean: float) -> None:
    rows = (mean + np.random.default_rng(1).normal(size=(3000, 6))).astype(np.float32)  # float32 rounds by up to .06
    reference = ReferencePCA(svd_solver="full").fit(rows.astype(np.float64))
    merged = GramSums(6)
    for part in np.array_split(rows, 13):
        merged.merge(sums_of(part))
    for sums in (sums_of(rows), merged):
        pca = fit_pca(sums, 1.0)
        assert pca.n_out == 6
        np.testing.assert_allclose(pca.explained_variance_ratio, reference.explained_variance_ratio_, rtol=1e-6)


def test_column_with_large_variance_does_not_reduce_the_rank() -> None:
    rows = np.random.default_rng(2).normal(size=(5000, 5)) * [3e4, 1, 1, 1, 0.1]
    assert fit_pca(sums_of(rows.astype(np.float32)), k=5).n_out == 5


@pytest.mark.parametrize("value", [0.1, 3e4 + 1 / 3, 1e7])
def test_equal_rows_with_a_large_mean_are_rejected_for_any_partitioning(value: float) -> None:
    rows = np.tile(np.float32([value, -value, 1.0]), (4001, 1))
    merged = GramSums(3)
    for part in np.array_split(rows, [1, 5, 800, 803, 2999]):
        merged.merge(sums_of(part))
    with pytest.raises(ModelError, match="all 4001 rows are equal"):
        fit_pca(merged)


def test_projection_is_rebuilt_from_its_arrays(pixels: Features) -> None:
    pca = fit_pca(sums_of(pixels))
    again = projection_from_arrays("pca", 64, pca.to_arrays())
    np.testing.assert_array_equal(again.transform(pixels), pca.transform(pixels))
    assert again.transform(pixels).dtype == np.float32
    assert (again.kind, again.n_in, again.n_out) == ("pca", 64, pca.n_out)


def test_no_projection_returns_the_features(pixels: Features) -> None:
    projection = projection_from_arrays("none", 64, {})
    assert projection == NoProjection(64)
    assert (projection.n_in, projection.n_out, projection.to_arrays()) == (64, 64, {})
    np.testing.assert_array_equal(projection.transform(pixels), pixels)


def invalid_arrays() -> dict[str, tuple[dict[str, np.ndarray], str]]:
    whole = PCA(np.zeros(4, np.float32), np.eye(2, 4, dtype=np.float32), np.full(4, 0.25, np.float32)).to_arrays()
    nan = np.array([[np.nan, 0, 0, 0], [0, 1, 0, 0]], np.float32)
    return {
        "missing array": ({"mean": whole["mean"], "components": whole["components"]}, "'explained_variance_ratio' is"),
        "wrong width": (whole | {"components": np.eye(2, 5, dtype=np.float32)}, "'components' should be float32 of"),
        "wrong rank": (whole | {"mean": np.zeros((1, 4), np.float32)}, "'mean' should be float32 of shape"),
        "wrong type": (whole | {"mean": np.zeros(4)}, "'mean' should be float32 .* got float64"),
        "text": (whole | {"mean": np.array(["a"] * 4)}, "'mean' should be float32"),
        "NaN": (whole | {"components": nan}, "'components' contains NaN"),
    }


@pytest.mark.parametrize("case", invalid_arrays())
def test_invalid_projection_arrays_are_rejected(case: str) -> None:
    arrays, reason = invalid_arrays()[case]
    with pytest.raises(ModelError, match=reason):
        projection_from_arrays("pca", 4, arrays)


def test_unknown_projection_error_lists_the_known_ones() -> None:
    with pytest.raises(ModelError, match="unknown projection 'umap', expected one of: none, pca"):
        projection_from_arrays("umap", 4, {})
