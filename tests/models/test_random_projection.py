import numpy as np
import pytest
from samples import Digits
from scipy.spatial.distance import pdist
from sklearn.random_projection import johnson_lindenstrauss_min_dim

from models.arrays import Arrays
from models.errors import ModelError
from models.projection import projection_from_arrays
from models.random_projection import johnson_lindenstrauss_dim, make_random_projection


@pytest.mark.parametrize("eps", [0.05, 0.1, 0.5, 0.99])
def test_width_matches_scikit_learn(eps: float) -> None:
    for rows in (2, 1_000, 22_688, 62_720, 10**9):
        assert johnson_lindenstrauss_dim(rows, eps) == johnson_lindenstrauss_min_dim(rows, eps=eps)
    assert johnson_lindenstrauss_dim(62_720, 0.1) == 9_468


@pytest.mark.parametrize(("rows", "eps"), [(1, 0.1), (0, 0.1), (100, 0.0), (100, 1.0), (100, float("nan"))])
def test_invalid_rows_or_eps_are_rejected(rows: int, eps: float) -> None:
    with pytest.raises(ModelError, match="at least 2 rows and an eps between 0 and 1"):
        johnson_lindenstrauss_dim(rows, eps)


def test_density_and_magnitude_follow_li_et_al() -> None:
    projection = make_random_projection(10_000, 400, seed=1)
    n = len(projection.columns)
    assert n == pytest.approx(400 * 10_000 / 100, rel=0.05)  # a density of 1 / sqrt(10,000)
    assert projection.signs.mean() == pytest.approx(0, abs=0.03)
    assert projection.magnitude == pytest.approx(np.sqrt(100 / 400))
    assert len(np.unique(projection.columns)) > 9_500  # nearly every feature is used
    assert sum(array.nbytes for array in projection.to_arrays().values()) < 6 * n + 8_000


def test_transform_is_the_product_with_the_stored_matrix() -> None:
    projection = make_random_projection(500, 60, seed=2)
    matrix = np.zeros((60, 500))
    for row in range(60):
        entries = slice(projection.indptr[row], projection.indptr[row + 1])
        matrix[row, projection.columns[entries]] = projection.signs[entries] * projection.magnitude
    features = np.random.default_rng(0).normal(size=(70, 500)).astype(np.float32)
    np.testing.assert_allclose(projection.transform(features), features @ matrix.T, rtol=1e-4, atol=1e-4)


def test_seed_determines_the_matrix() -> None:
    first, again, other = (make_random_projection(900, 100, seed=seed).to_arrays() for seed in (7, 7, 8))
    for name, array in first.items():
        np.testing.assert_array_equal(again[name], array)
    assert not np.array_equal(first["signs"][:100], other["signs"][:100])


def test_distances_of_wide_features_are_preserved_within_eps(digits: Digits) -> None:
    """62,720 columns: the real features of 49 images side by side; 19,900 distances."""
    eps, n = 0.1, 200
    rng = np.random.default_rng(0)
    features = np.stack([digits.features[rng.permutation(150)[:49]].ravel() for _ in range(n)])
    assert features.shape == (n, 62_720)
    projected = make_random_projection(62_720, johnson_lindenstrauss_dim(62_720, eps)).transform(features)
    assert projected.shape == (n, 9_468)
    ratio = pdist(projected, "sqeuclidean") / pdist(features, "sqeuclidean")
    assert np.mean(np.abs(ratio - 1) <= eps) >= 0.99


@pytest.mark.parametrize(("n_in", "n_out"), [(1280, 8_596), (1280, 0), (10, -1), (2_000_000, 10)])
def test_matrix_that_is_not_narrower_is_rejected(n_in: int, n_out: int) -> None:
    with pytest.raises(ModelError, match=f"got {n_out:,}|got {n_out}"):
        make_random_projection(n_in, n_out)


def _hostile() -> dict[str, tuple[Arrays, str]]:
    whole = make_random_projection(100, 10, seed=3).to_arrays()
    last = whole["columns"].copy()
    last[-1] = 100
    negative = whole["columns"].copy()
    negative[0] = -1
    twice = whole["columns"].copy()
    twice[1] = twice[0]
    falling, beyond, early = (whole["indptr"].copy() for _ in range(3))
    falling[[3, 4]] = falling[[4, 3]]
    beyond[-1] = 2**62
    early[0] = 5
    return {
        "column out of range": (whole | {"columns": last}, "ascending numbers from 0 to 99"),
        "negative column": (whole | {"columns": negative}, "ascending numbers"),
        "duplicate column": (whole | {"columns": twice}, "ascending numbers"),
        "overlapping rows": (whole | {"indptr": falling}, "do not divide"),
        "rows beyond the entries": (whole | {"indptr": beyond}, "do not divide"),
        "entries before the first row": (whole | {"indptr": early}, "do not divide"),
        "no rows": (whole | {"indptr": np.zeros(1, np.int64)}, "do not divide"),
        "more rows than columns": (whole | {"indptr": np.zeros(102, np.int64)}, "do not divide"),
        "zero signs": (whole | {"signs": np.zeros_like(whole["signs"])}, "not all 1 or -1"),
        "too few signs": (whole | {"signs": whole["signs"][1:]}, "not all 1 or -1"),
        "float columns": (whole | {"columns": whole["columns"].astype(float)}, "'columns' should be int32"),
        "scalar indptr": (whole | {"indptr": np.array(3)}, "'indptr' should be int64 in one dimension"),
        "NaN magnitude": (whole | {"magnitude": np.array([np.nan])}, "one magnitude"),
        "infinite magnitude": (whole | {"magnitude": np.array([np.inf])}, "one magnitude"),
        "zero magnitude": (whole | {"magnitude": np.zeros(1)}, "one magnitude"),
        "two seeds": (whole | {"seed": np.zeros(2, np.int64)}, "one seed"),
    }


@pytest.mark.parametrize("case", _hostile())
def test_hostile_arrays_are_rejected(case: str) -> None:
    arrays, reason = _hostile()[case]
    with pytest.raises(ModelError, match=reason):
        projection_from_arrays("random", 100, arrays)


def test_empty_rows_project_to_zero() -> None:
    sparse = make_random_projection(50, 40, seed=0, density=0.01)
    assert (np.diff(sparse.indptr) == 0).sum() > 10
    again = projection_from_arrays("random", 50, sparse.to_arrays())
    projected = again.transform(np.ones((3, 50), np.float32))
    assert not projected[:, np.diff(sparse.indptr) == 0].any()
    assert projected.any()
