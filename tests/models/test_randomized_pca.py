"""One-pass randomized PCA, compared with exact PCA of the same rows."""

import numpy as np
import pytest
from samples import Digits

from models.arrays import Features
from models.errors import ModelError
from models.projection import PCA, GramSums, fit_pca
from models.randomized_pca import RangeSketch, fit_randomized_pca


def sketch_of(rows: Features, size: int, seed: int = 0) -> RangeSketch:
    sketch = RangeSketch(rows.shape[1], size, seed)
    sketch.add(rows)
    return sketch


def exact(rows: Features, k: int) -> PCA:
    sums = GramSums(rows.shape[1])
    sums.add(rows)
    return fit_pca(sums, k=k)


def explained(pca: PCA, rows: Features) -> float:
    """The share of the variance of `rows` that the components explain."""
    centred = rows.astype(np.float64) - rows.mean(axis=0, dtype=np.float64)
    return float((np.square(centred @ pca.components.T.astype(np.float64)).sum()) / np.square(centred).sum())


def test_components_capture_nearly_as_much_variance_as_exact_pca(digits: Digits) -> None:
    rows = digits.features
    sketch = RangeSketch(rows.shape[1], 30)
    sketch.add(rows)
    got = fit_randomized_pca(sketch, k=10)
    assert (got.n_in, got.n_out) == (rows.shape[1], 10)
    np.testing.assert_allclose(got.components @ got.components.T, np.eye(10), atol=1e-5)
    best = explained(exact(rows, 10), rows)
    assert best - 0.03 <= explained(got, rows) <= best + 1e-6
    assert got.explained_variance_ratio.shape == (30,)
    assert (np.diff(got.explained_variance_ratio) <= 0).all()


def test_low_rank_rows_give_the_exact_components(digits: Digits) -> None:
    rows = digits.features[:30]  # of rank 29 at most
    got, want = fit_randomized_pca(sketch_of(rows, 60), k=12), exact(rows, 12)
    np.testing.assert_allclose(got.components, want.components, atol=1e-4)
    np.testing.assert_allclose(got.mean, want.mean, atol=1e-6)
    np.testing.assert_allclose(
        got.explained_variance_ratio[:12], want.explained_variance_ratio[:12], rtol=1e-4, atol=1e-7
    )


def test_partial_sketches_merge_to_the_whole_in_any_order(digits: Digits) -> None:
    rows = digits.features
    whole = fit_randomized_pca(sketch_of(rows, 40), k=15)
    merged = RangeSketch(rows.shape[1], 40)
    for part in (rows[100:], rows[:0], rows[:37], rows[37:100]):
        merged.merge(sketch_of(part, 40))
    assert merged.n == len(rows)
    got = fit_randomized_pca(merged, k=15)
    np.testing.assert_allclose(got.components, whole.components, atol=1e-5)
    np.testing.assert_allclose(got.explained_variance_ratio, whole.explained_variance_ratio, rtol=1e-5)


def test_incompatible_sketches_do_not_merge() -> None:
    for other in (RangeSketch(50, 10, seed=1), RangeSketch(50, 11), RangeSketch(51, 10)):
        with pytest.raises(ModelError, match="merge if width, size and seed are the same"):
            RangeSketch(50, 10).merge(other)


def test_variance_target_is_met_up_to_the_size_of_the_sketch(digits: Digits) -> None:
    sketch = sketch_of(digits.features, 60)
    few, more = (fit_randomized_pca(sketch, explained_variance=share) for share in (0.5, 0.6))
    assert few.n_out < more.n_out < 60
    assert explained(few, digits.features) >= 0.5
    with pytest.raises(
        ModelError, match=r"a sketch of 60 columns explains 0\.\d+ of the variance, 0.999 was requested"
    ):
        fit_randomized_pca(sketch, explained_variance=0.999)


def test_too_wide_for_exact_pca_error_names_size_and_alternatives() -> None:
    with pytest.raises(ModelError, match=r"PCA of 62,720 features needs 31\.5 GB") as caught:
        GramSums(62_720)
    for alternative in ("sparse random projection", "randomized PCA", "pooled output"):
        assert alternative in str(caught.value)
    sketch = RangeSketch(62_720, 20)  # the same width works with few columns
    sketch.add(np.random.default_rng(0).random((12, 62_720), np.float32))
    assert fit_randomized_pca(sketch, k=5).n_in == 62_720
    with pytest.raises(ModelError, match=r"a sketch of 5,000 columns needs 2\.5 GB"):
        RangeSketch(62_720, 5_000)


def test_invalid_rows_and_sizes_are_rejected(digits: Digits) -> None:
    rows = digits.features
    with pytest.raises(ModelError, match="at least 2 rows"):
        fit_randomized_pca(sketch_of(rows[:1], 10), k=1)
    with pytest.raises(ModelError, match="all 5 rows are equal"):
        fit_randomized_pca(sketch_of(np.repeat(rows[:1], 5, axis=0), 10), k=1)
    with pytest.raises(ModelError, match="finite features"):
        fit_randomized_pca(sketch_of(np.where(rows > 1, np.nan, rows), 10), k=1)
    with pytest.raises(ModelError, match="k must be from 1 to 10"):
        fit_randomized_pca(sketch_of(rows, 10), k=11)
    with pytest.raises(ModelError, match="1 to 1280 columns, got 0"):
        RangeSketch(1280, 0)


def test_large_mean_in_one_column_does_not_hide_the_variance_of_others() -> None:
    rows = np.random.default_rng(0).normal(size=(2000, 40))
    rows[:, :4] *= 10
    rows[:, 7] += 3e4
    narrow = rows.astype(np.float32)
    sketch = RangeSketch(40, 30)
    for part in np.array_split(narrow, 5):
        sketch.merge(sketch_of(part, 30))
    assert explained(fit_randomized_pca(sketch, k=4), narrow) == pytest.approx(
        explained(exact(narrow, 4), narrow), abs=0.01
    )
