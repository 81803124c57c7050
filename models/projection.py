"""Projections of features: (N, D) float32 in, (N, K) float32 out.

PCA is fitted from sums. One pass over the data accumulates, per partition, the row count n, the mean m and the scatter
matrix S = Σ (x − m)(x − m)ᵀ. Two of these merge exactly: S = S₁ + S₂ + (n₁ n₂ / n) δ δᵀ, where δ is the difference of
the means (Chan, Golub and LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances").
Since nothing is subtracted from a sum of squares, a large mean causes no cancellation. The covariance is S / (n − 1),
and its eigenvalues are the variances of all components, so choosing K by explained variance needs no second fit. Memory
is O(D²), independent of N. Source: Jolliffe, "Principal Component Analysis", 2nd ed., ch. 1 and 3.
"""

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from models.arrays import Arrays, Features, checked_array, multiply_rows
from models.errors import ModelError
from models.random_projection import random_projection_from_arrays

MAX_PCA_BYTES = 2 * 1024**3  # of the sums in every worker and the driver: D = 16,384
EPSILON = float(np.finfo(np.float64).eps)
_EIGEN_COPIES = 5  # sums, covariance, eigenvectors, and LAPACK's workspace


class Projection(Protocol):
    """The interface of projections for scoring."""

    @property
    def kind(self) -> str: ...

    @property
    def n_in(self) -> int: ...

    @property
    def n_out(self) -> int: ...

    def transform(self, features: Features) -> Features:
        """(N, n_in) float32 → (N, n_out) float32; the input is not modified, and rows are independent."""
        ...

    def to_arrays(self) -> Arrays:
        """The arrays from which `projection_from_arrays` restores the projection."""
        ...


@dataclass(frozen=True)
class NoProjection:
    """The identity."""

    n_in: int
    kind: str = "none"

    @property
    def n_out(self) -> int:
        return self.n_in

    def transform(self, features: Features) -> Features:
        return features

    def to_arrays(self) -> Arrays:
        return {}


@dataclass(frozen=True)
class PCA:
    """Principal components: `(features - mean) @ components.T`.

    Attributes:
        mean: (D,) float32.
        components: (K, D) float32, orthonormal rows by decreasing variance; the entry of largest magnitude is positive.
        explained_variance_ratio: (D,) float32, of all components, not only the K kept; of a randomized PCA, as many as
            the columns of its sketch.
    """

    mean: Features
    components: Features
    explained_variance_ratio: Features
    kind: str = "pca"

    @property
    def n_in(self) -> int:
        return int(self.components.shape[1])

    @property
    def n_out(self) -> int:
        return int(self.components.shape[0])

    def transform(self, features: Features) -> Features:
        return multiply_rows(features - self.mean, self.components.T)

    def to_arrays(self) -> Arrays:
        return {
            "mean": self.mean,
            "components": self.components,
            "explained_variance_ratio": self.explained_variance_ratio,
        }


@dataclass
class GramSums:
    """Row count, mean and scatter matrix of rows of width D, in float64; `add` rows, `merge` partitions.

    Attributes:
        n: rows.
        mean: (D,) of the rows.
        scatter: (D, D) the Gram matrix of the rows about their mean.
    """

    n_features: int
    n: int = 0
    mean: NDArray[np.float64] = field(init=False)
    scatter: NDArray[np.float64] = field(init=False)

    def __post_init__(self) -> None:
        check_pca_memory(self.n_features)
        self.mean = np.zeros(self.n_features)
        self.scatter = np.zeros((self.n_features, self.n_features))

    def add(self, rows: Features) -> None:
        """Add rows (N, D)."""
        if len(rows):
            self.n, self.mean, centred = mean_and_centred(self.n, self.mean, rows)
            self.scatter += centred.T @ centred

    def merge(self, other: "GramSums") -> None:
        """Add the sums of another partition."""
        self.n, self.mean, between = merged_means(self.n, self.mean, other.n, other.mean)
        self.scatter += other.scatter
        self.scatter += np.outer(between, between)


def mean_and_centred(
    n: int, mean: NDArray[np.float64], rows: Features
) -> tuple[int, NDArray[np.float64], NDArray[np.float64]]:
    """Row count and mean (D,) after adding N ≥ 1 rows, and the (N + 1, D) centred rows to add to the scatter matrix.

    These are the rows about their own mean, and one for the difference between that mean and `mean`.
    """
    grown = np.empty((len(rows) + 1, rows.shape[1]))
    centred = grown[:-1]
    centred[:] = rows
    own = centred.mean(axis=0)
    centred -= own
    rounding = centred.mean(axis=0)  # of the mean: with a second pass, equal rows become exactly zero
    centred -= rounding
    total, merged, grown[-1] = merged_means(n, mean, len(rows), own + rounding)
    return total, merged, grown


def merged_means(
    n: int, mean: NDArray[np.float64], m: int, other: NDArray[np.float64]
) -> tuple[int, NDArray[np.float64], NDArray[np.float64]]:
    """Row count and mean (D,) of two merged parts, and the vector b (D,) with b bᵀ to add to their scatter."""
    total = n + m
    delta = other - mean
    return total, mean + delta * (m / max(1, total)), delta * np.sqrt(n * m / max(1, total))


def check_pca_memory(n_features: int, size: int | None = None) -> None:
    """Reject a PCA whose sums do not fit into memory: D x D, or D x `size` for a randomized one.

    Raises:
        ModelError: they need more than `MAX_PCA_BYTES`; says how much, and what to do instead.
    """
    width = n_features if size is None else size
    needed = 8 * n_features * width
    if needed <= MAX_PCA_BYTES:
        return
    if size is not None:
        raise ModelError(
            f"a randomized PCA of {n_features:,} features with a sketch of {size:,} columns needs {needed / 1e9:.1f} "
            f"GB in every worker, at most {MAX_PCA_BYTES / 1e9:.1f} GB is allowed; take fewer components"
        )
    raise ModelError(
        f"PCA of {n_features:,} features needs {needed / 1e9:.1f} GB for its sums in every worker and "
        f"{_EIGEN_COPIES * needed / 1e9:.0f} GB to solve them, at most {MAX_PCA_BYTES / 1e9:.1f} GB of sums is "
        "allowed; use a sparse random projection, a randomized PCA with few components, or the backbone's pooled "
        "output"
    )


def fit_pca(sums: GramSums, explained_variance: float | None = 0.90, k: int | None = None) -> PCA:
    """Fit an exact PCA from sums.

    Args:
        explained_variance: keep the fewest components that explain at least this share of the variance.
        k: keep this number of components instead.

    Raises:
        ModelError: fewer than two rows, not finite, no variance, or a target outside (0, 1] or 1…rank.
    """
    if sums.n < 2:  # noqa: PLR2004
        raise ModelError(f"PCA needs at least 2 rows with features, got {sums.n}")
    if not np.isfinite(sums.scatter).all():
        raise ModelError("PCA needs finite features; some are NaN or infinite")
    variances, vectors = np.linalg.eigh(sums.scatter / (sums.n - 1))
    variances = np.clip(variances[::-1], 0.0, None)  # rounding can leave tiny negative ones
    cutoff = max(EPSILON * sums.n_features * variances[0], variance_of_rounding(sums.mean))
    rank = min(int(np.count_nonzero(variances > cutoff)), sums.n - 1)
    if not rank:
        raise ModelError(f"PCA needs features that vary; all {sums.n} rows are equal")
    ratio = variances / variances.sum()
    kept = components_to_keep(ratio, rank, explained_variance, k)
    return pca_of(sums.mean, vectors[:, ::-1].T[:kept], ratio)


def pca_of(mean: NDArray[np.float64], components: NDArray[np.float64], ratio: NDArray[np.float64]) -> PCA:
    """The PCA of components (K, D), whose arbitrary signs are normalised, so that fits are comparable."""
    largest = components[np.arange(len(components)), np.abs(components).argmax(axis=1)]
    components = components * np.sign(largest)[:, None]
    return PCA(mean.astype(np.float32), components.astype(np.float32), ratio.astype(np.float32))


def variance_of_rounding(mean: NDArray[np.float64]) -> float:
    """The largest apparent variance of equal rows due to rounding of the means."""
    return float((8 * EPSILON) ** 2 * (mean @ mean))


def components_to_keep(ratio: NDArray[np.float64], rank: int, explained_variance: float | None, k: int | None) -> int:
    """The number of components: `k`, or the fewest that explain the variance, at most `rank`."""
    if k is not None:
        if not 1 <= k <= rank:
            raise ModelError(f"PCA's k must be from 1 to {rank}, the rank of the features, got {k}")
        return k
    if explained_variance is None or not 0 < explained_variance <= 1:
        raise ModelError(f"the explained variance must be above 0 and at most 1, got {explained_variance}")
    # As in scikit-learn: the first k whose cumulative ratio exceeds the target.
    return min(int(np.searchsorted(np.cumsum(ratio), explained_variance, side="right")) + 1, rank)


def projection_from_arrays(kind: str, n_in: int, arrays: Arrays) -> Projection:
    """Restore a projection of `n_in` features from the arrays of `to_arrays`.

    Raises:
        ModelError: an unknown kind, or arrays that are missing, of the wrong shape, or not finite.
    """
    match kind:
        case "none":
            return NoProjection(n_in)
        case "pca":
            return _pca_from_arrays(n_in, arrays)
        case "random":
            return random_projection_from_arrays(n_in, arrays)
    raise ModelError(f"unknown projection {kind!r}, expected one of: none, pca, random")


def _pca_from_arrays(n_in: int, arrays: Arrays) -> PCA:
    mean = checked_array(arrays, "mean", (n_in,), np.float32)
    components = checked_array(arrays, "components", (None, n_in), np.float32)
    ratio = checked_array(arrays, "explained_variance_ratio", (None,), np.float32)
    if not 1 <= len(components) <= len(ratio) <= n_in:
        raise ModelError(f"a PCA of {n_in} features cannot have {len(components)} components, {len(ratio)} variances")
    return PCA(mean, components, ratio)
