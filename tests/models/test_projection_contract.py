"""Properties that hold for every projection, tested on real features."""

from collections.abc import Callable

import numpy as np
import pytest
from samples import Digits

from models.arrays import Features, read_npz, write_npz
from models.errors import ModelError
from models.projection import GramSums, NoProjection, Projection, fit_pca, projection_from_arrays
from models.random_projection import make_random_projection
from models.randomized_pca import RangeSketch, fit_randomized_pca


def _pca(features: Features) -> Projection:
    sums = GramSums(features.shape[1])
    sums.add(features)
    return fit_pca(sums, k=20)


def _randomized_pca(features: Features) -> Projection:
    sketch = RangeSketch(features.shape[1], 50)
    sketch.add(features)
    return fit_randomized_pca(sketch, k=20)


MAKERS: dict[str, Callable[[Features], Projection]] = {
    "none": lambda features: NoProjection(features.shape[1]),
    "pca": _pca,
    "randomized pca": _randomized_pca,
    "random": lambda features: make_random_projection(features.shape[1], 300, seed=5),
}


@pytest.fixture(scope="module", params=MAKERS)
def make(request: pytest.FixtureRequest) -> Callable[[Features], Projection]:
    return MAKERS[request.param]


@pytest.fixture(scope="module")
def projection(make: Callable[[Features], Projection], digits: Digits) -> Projection:
    return make(digits.features)


def test_projected_shape_and_dtype_are_as_declared(projection: Projection, digits: Digits) -> None:
    projected = projection.transform(digits.features)
    assert projection.n_in == digits.features.shape[1]
    assert (projected.shape, projected.dtype) == ((len(digits.features), projection.n_out), np.float32)
    assert np.isfinite(projected).all()
    assert projection.transform(digits.features[:0]).shape == (0, projection.n_out)


def test_rows_are_independent_and_features_are_not_modified(projection: Projection, digits: Digits) -> None:
    features = digits.features.copy()
    features.flags.writeable = False
    projected = projection.transform(features)
    order = np.random.default_rng(0).permutation(len(features))
    np.testing.assert_array_equal(projection.transform(features[order]), projected[order])
    for count in (1, 3, 16):  # BLAS has different kernels for different numbers of rows
        np.testing.assert_array_equal(projection.transform(features[7 : 7 + count]), projected[7 : 7 + count])
    np.testing.assert_array_equal(features, digits.features)


def test_fitting_is_deterministic(
    make: Callable[[Features], Projection], projection: Projection, digits: Digits
) -> None:
    again = make(digits.features).to_arrays()
    for name, array in projection.to_arrays().items():
        np.testing.assert_array_equal(again[name], array)


def test_projection_round_trips_through_npz(projection: Projection, digits: Digits) -> None:
    stored = read_npz(write_npz(projection.to_arrays()), "projection.npz")
    again = projection_from_arrays(projection.kind, projection.n_in, stored)
    assert (again.kind, again.n_in, again.n_out) == (projection.kind, projection.n_in, projection.n_out)
    np.testing.assert_array_equal(again.transform(digits.features), projection.transform(digits.features))


@pytest.mark.parametrize("name", [name for name in MAKERS if name != "none"])  # which accepts any width
def test_wrong_width_and_missing_arrays_are_rejected(name: str, digits: Digits) -> None:
    projection = MAKERS[name](digits.features)
    arrays = projection.to_arrays()
    with pytest.raises(ModelError):
        projection_from_arrays(projection.kind, 16, arrays)
    for missing in arrays:
        others = {name: array for name, array in arrays.items() if name != missing}
        with pytest.raises(ModelError, match=f"'{missing}' is missing"):
            projection_from_arrays(projection.kind, projection.n_in, others)


def test_nearest_neighbours_are_preserved(projection: Projection, digits: Digits) -> None:
    """Nearest neighbours have the same label about as often as in the original features."""

    def hits(rows: Features) -> float:
        distances = np.linalg.norm(rows[:, np.newaxis] - rows, axis=2)
        np.fill_diagonal(distances, np.inf)
        labels = np.array(digits.labels)
        return float(np.mean(labels[distances.argmin(axis=1)] == labels))

    assert hits(projection.transform(digits.features)) >= hits(digits.features) - 0.1
