"""Randomized PCA in one pass, for few components of features too wide for their Gram matrix.

Where exact PCA accumulates the scatter matrix S (D x D; see `models.projection`), this accumulates Y = S Ω, D x L, for
a fixed random Ω of L columns. Y captures the dominant directions of S, and merges as S does. The Nyström approximation
S ≈ Y (ΩᵀY)⁻¹ Yᵀ then yields the components. Source: Tropp, Yurtsever, Udell and Cevher 2017, "Fixed-rank approximation
of a positive-semidefinite matrix from streaming data", algorithm 3. Memory is O(D L), independent of N. The default is
an L of a little more than twice the number of components, as they recommend.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

from models.arrays import Features
from models.errors import ModelError
from models.projection import (
    EPSILON,
    PCA,
    check_pca_memory,
    components_to_keep,
    mean_and_centred,
    merged_means,
    pca_of,
    variance_of_rounding,
)

_BLOCK = 256  # rows converted to float64 at a time


@dataclass
class RangeSketch:
    """Row count, mean, sum of squares and Y of rows of width D, in float64; `add` rows, `merge` partitions.

    All partitions must have the same `size` and `seed`, and therefore the same Ω.

    Attributes:
        n_features: D.
        size: L.
        seed: of Ω.
        n: rows.
        mean: (D,) of the rows.
        squares: the sum of squares about the mean.
        sketch: Y, (D, L).
        directions: Ω, (D, L).
    """

    n_features: int
    size: int  # L
    seed: int = 0
    n: int = 0
    mean: NDArray[np.float64] = field(init=False)
    squares: float = 0.0
    sketch: NDArray[np.float64] = field(init=False)
    directions: NDArray[np.float64] = field(init=False, repr=False)  # Ω, (D, L), made from the seed

    def __post_init__(self) -> None:
        if not 1 <= self.size <= self.n_features:
            raise ModelError(f"the sketch of a randomized PCA has 1 to {self.n_features} columns, got {self.size}")
        check_pca_memory(self.n_features, self.size)
        self.mean = np.zeros(self.n_features)
        self.sketch = np.zeros((self.n_features, self.size))
        self.directions = np.random.default_rng(self.seed).normal(size=(self.n_features, self.size))

    def add(self, rows: Features) -> None:
        """Add rows (N, D)."""
        for start in range(0, len(rows), _BLOCK):
            self.n, self.mean, centred = mean_and_centred(self.n, self.mean, rows[start : start + _BLOCK])
            self.squares += float(np.vdot(centred, centred))
            self.sketch += centred.T @ (centred @ self.directions)

    def merge(self, other: "RangeSketch") -> None:
        """Add the sketch of another partition; raises ModelError if its Ω differs."""
        ours, theirs = ((part.n_features, part.size, part.seed) for part in (self, other))
        if ours != theirs:
            raise ModelError(f"sketches merge if width, size and seed are the same, got {ours} and {theirs}")
        self.n, self.mean, between = merged_means(self.n, self.mean, other.n, other.mean)
        self.squares += other.squares + float(between @ between)
        self.sketch += other.sketch + np.outer(between, between @ self.directions)


def fit_randomized_pca(sketch: RangeSketch, explained_variance: float | None = None, k: int | None = None) -> PCA:
    """Fit a PCA from a sketch; its `explained_variance_ratio` has length L.

    Args:
        explained_variance: keep the fewest components that explain at least this share of the variance.
        k: keep this number of components instead.

    Raises:
        ModelError: fewer than two rows, not finite, no variance, k above the rank of the sketch, or a share of the
            variance that the sketch does not reach.
    """
    if sketch.n < 2:  # noqa: PLR2004
        raise ModelError(f"PCA needs at least 2 rows with features, got {sketch.n}")
    if not np.isfinite(sketch.squares) or not np.isfinite(sketch.sketch).all():
        raise ModelError("PCA needs finite features; some are NaN or infinite")
    whole = sketch.squares / (sketch.n - 1)  # the total variance
    if not whole > variance_of_rounding(sketch.mean):
        raise ModelError(f"PCA needs features that vary; all {sketch.n} rows are equal")
    variances, vectors = _nystrom(sketch.sketch / (sketch.n - 1), sketch.directions)
    ratio = np.minimum(variances / whole, 1.0)
    rank = int(np.count_nonzero(ratio > EPSILON * sketch.n_features))
    if k is None and explained_variance is not None and ratio.sum() < explained_variance <= 1:
        raise ModelError(
            f"a sketch of {sketch.size} columns explains {ratio.sum():.3f} of the variance, "
            f"{explained_variance} was requested; use a wider sketch, or a number of components"
        )
    kept = components_to_keep(ratio, min(rank, sketch.n - 1), explained_variance, k)
    return pca_of(sketch.mean, vectors[:, :kept].T, ratio)


def _nystrom(
    product: NDArray[np.float64], directions: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Eigenvalues (L,), descending, and eigenvectors (D, L) of a matrix, given its product with Ω.

    A small multiple of the identity is added and subtracted again, so that the Cholesky factor exists at any rank.
    """
    shift = np.sqrt(len(product)) * float(np.finfo(np.float64).eps) * float(np.linalg.norm(product))
    shifted = product + shift * directions
    core = directions.T @ shifted
    try:
        factor = linalg.cholesky((core + core.T) / 2)
    except linalg.LinAlgError as error:
        raise ModelError("the sketch is of too few or too similar rows for its size; use a smaller one") from error
    root = linalg.solve_triangular(factor, shifted.T, trans="T").T
    vectors, singular, _ = linalg.svd(root, full_matrices=False)
    return np.maximum(singular**2 - shift, 0.0), vectors
