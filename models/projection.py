"""Projections of features: (N, D) float32 in, (N, K) float32 out.

PCA is fitted from sums alone. One pass over the data adds up, per partition, the row count n, the sum of the rows
s = Σx and the Gram matrix G = Σ x xᵀ; such sums merge by addition. The covariance is C = (G − s sᵀ/n) / (n − 1), and
the eigenvalues of C are the variances of all components at once, so choosing K by explained variance needs no second
fit. Memory is O(D²) whatever N is. Source: Jolliffe, "Principal Component Analysis", 2nd ed., ch. 1 and 3.
"""

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from models.arrays import Arrays, Features, checked_array
from models.errors import ModelError


class Projection(Protocol):
    """What the scoring path asks of a projection."""

    @property
    def kind(self) -> str: ...

    @property
    def n_in(self) -> int: ...

    @property
    def n_out(self) -> int: ...

    def transform(self, features: Features) -> Features:
        """(N, n_in) float32 → (N, n_out) float32; the input is not changed."""
        ...

    def to_arrays(self) -> Arrays:
        """The arrays that `projection_from_arrays` rebuilds it from."""
        ...


@dataclass(frozen=True)
class NoProjection:
    """Features as they are."""

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
        components: (K, D) float32, orthonormal rows, by falling variance; the entry of largest magnitude is positive.
        explained_variance_ratio: (D,) float32, of every component, not only of the K kept: the variance curve.
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
        projected: Features = np.matmul(features - self.mean, self.components.T)
        return projected

    def to_arrays(self) -> Arrays:
        return {
            "mean": self.mean,
            "components": self.components,
            "explained_variance_ratio": self.explained_variance_ratio,
        }


@dataclass
class GramSums:
    """Row count, sum and Gram matrix of rows of width D, in float64; `add` rows, `merge` partitions."""

    n_features: int
    n: int = 0
    total: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    gram: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 0)))

    def __post_init__(self) -> None:
        if not self.total.size:
            self.total = np.zeros(self.n_features)
            self.gram = np.zeros((self.n_features, self.n_features))

    def add(self, rows: Features) -> None:
        """Take in rows (N, D)."""
        wide = rows.astype(np.float64)
        self.n += len(wide)
        self.total += wide.sum(axis=0)
        self.gram += wide.T @ wide

    def merge(self, other: "GramSums") -> None:
        """Take in the sums of another part of the same data."""
        self.n += other.n
        self.total += other.total
        self.gram += other.gram


def fit_pca(sums: GramSums, explained_variance: float | None = 0.90, k: int | None = None) -> PCA:
    """Exact PCA from sums: the fewest components that explain at least `explained_variance`, or just `k` of them.

    Raises:
        ModelError: fewer than two rows, not finite, no variance, or a target outside (0, 1] or 1…rank.
    """
    if sums.n < 2:  # noqa: PLR2004
        raise ModelError(f"PCA needs at least 2 rows with features, got {sums.n}")
    if not np.isfinite(sums.gram).all():
        raise ModelError("PCA needs finite features; some are NaN or infinite")
    mean = sums.total / sums.n
    covariance = (sums.gram - np.outer(sums.total, mean)) / (sums.n - 1)
    variances, vectors = np.linalg.eigh(covariance)
    variances = np.clip(variances[::-1], 0.0, None)  # rounding can leave tiny negative ones
    rank = int(np.count_nonzero(variances > _rounding(sums)))
    if not rank:
        raise ModelError(f"PCA needs features that vary; all {sums.n} rows are equal")
    ratio = variances / variances.sum()
    kept = _components_to_keep(ratio, rank, explained_variance, k)
    components = vectors[:, ::-1].T[:kept]
    largest = components[np.arange(kept), np.abs(components).argmax(axis=1)]
    components = components * np.sign(largest)[:, None]  # an eigenvector's sign is free: fix it, so fits compare
    return PCA(mean.astype(np.float32), components.astype(np.float32), ratio.astype(np.float32))


def _rounding(sums: GramSums) -> float:
    """What a variance of zero may look like: the sums' rounding error, which grows with their length and size."""
    largest = float(np.diag(sums.gram).max()) / (sums.n - 1)
    return float(np.finfo(np.float64).eps) * max(sums.n, sums.n_features) * largest


def _components_to_keep(ratio: NDArray[np.float64], rank: int, explained_variance: float | None, k: int | None) -> int:
    if k is not None:
        if not 1 <= k <= rank:
            raise ModelError(f"PCA's k must be from 1 to {rank}, the rank of the features, got {k}")
        return k
    if explained_variance is None or not 0 < explained_variance <= 1:
        raise ModelError(f"the explained variance must be above 0 and at most 1, got {explained_variance}")
    # As scikit-learn: the first k whose cumulative ratio is above the target, so that the target is reached.
    return min(int(np.searchsorted(np.cumsum(ratio), explained_variance, side="right")) + 1, rank)


def projection_from_arrays(kind: str, n_in: int, arrays: Arrays) -> Projection:
    """Rebuild a projection from what `to_arrays` gave.

    Raises:
        ModelError: an unknown kind, or arrays missing, of the wrong shape, or not finite.
    """
    if kind == "none":
        return NoProjection(n_in)
    if kind != "pca":
        raise ModelError(f"unknown projection {kind!r}, expected one of: none, pca")
    mean = checked_array(arrays, "mean", (n_in,), np.float32)
    components = checked_array(arrays, "components", (None, n_in), np.float32)
    ratio = checked_array(arrays, "explained_variance_ratio", (n_in,), np.float32)
    return PCA(mean, components, ratio)
