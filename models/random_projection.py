"""Sparse random projection: dimensionality reduction that preserves distances, for features too wide for PCA.

Johnson-Lindenstrauss lemma: for N points, K >= 4 ln N / (eps^2/2 - eps^3/3) random directions preserve every squared
distance within a factor of 1 ± eps in any dimension (Dasgupta and Gupta 2003, "An elementary proof of a theorem of
Johnson and Lindenstrauss"). Directions may be sparse: entries are ±sqrt(1 / (density K)), each with probability
density / 2, else 0 (Achlioptas 2003, "Database-friendly random projections"), down to a density of 1 / sqrt(D) (Li,
Hastie and Church 2006, "Very sparse random projections").
"""

from dataclasses import dataclass, field
from math import log, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.arrays import Arrays, Features
from models.errors import ModelError

MAX_WIDTH = 1_000_000  # of a bundle's stages
_BLOCK = 32  # rows projected at a time, so that their result of thousands of columns stays in the cache
_MAX_MAGNITUDE = 1e6  # far above that of the sparsest matrix, and far below overflow


def johnson_lindenstrauss_dim(n_rows: int, eps: float = 0.1) -> int:
    """The number of columns that preserves squared distances of `n_rows` points within 1 ± eps, as in scikit-learn.

    Raises:
        ModelError: fewer than two rows, or an eps outside (0, 1).
    """
    if n_rows < 2 or not 0 < eps < 1:  # noqa: PLR2004
        raise ModelError(f"random projection needs at least 2 rows and an eps between 0 and 1, got {n_rows} and {eps}")
    return int(4 * log(n_rows) / (eps**2 / 2 - eps**3 / 3))


@dataclass(frozen=True)
class SparseRandomProjection:
    """`features @ R.T` with a sparse R of K x D whose nonzero entries have one magnitude.

    R is stored rather than its seed, because NumPy does not guarantee the same random numbers across versions; an
    entry takes 5 bytes (12 MB for 9,468 x 62,720).

    Attributes:
        n_in: D.
        indptr: (K + 1,) int64; the entries of row k are at indptr[k] to indptr[k + 1], as in SciPy's CSR.
        columns: (nnz,) int32, the column of each entry, ascending within a row.
        signs: (nnz,) int8, each 1 or -1.
        magnitude: sqrt(1 / (density K)).
        seed: the seed of R.
    """

    n_in: int
    indptr: NDArray[np.int64]
    columns: NDArray[np.int32]
    signs: NDArray[np.int8]
    magnitude: float
    seed: int
    kind: str = "random"
    _by_column: Any = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        from scipy.sparse import csr_array  # imported late: not every worker needs SciPy

        values = self.signs.astype(np.float32) * np.float32(self.magnitude)
        matrix = csr_array((values, self.columns, self.indptr), shape=(self.n_out, self.n_in))
        # In CSC, a product reads the features once, and its result is small.
        object.__setattr__(self, "_by_column", matrix.tocsc())

    @property
    def n_out(self) -> int:
        return len(self.indptr) - 1

    def transform(self, features: Features) -> Features:
        """(N, n_in) float32 → (N, n_out) float32; the input is not modified, and rows are independent."""
        projected = np.empty((len(features), self.n_out), np.float32)
        for start in range(0, len(features), _BLOCK):
            block = features[start : start + _BLOCK]
            projected[start : start + _BLOCK] = (self._by_column @ np.ascontiguousarray(block.T)).T
        return projected

    def to_arrays(self) -> Arrays:
        return {
            "indptr": self.indptr,
            "columns": self.columns,
            "signs": self.signs,
            "magnitude": np.array([self.magnitude], np.float64),
            "seed": np.array([self.seed], np.int64),
        }


def make_random_projection(
    n_in: int, n_out: int, seed: int = 0, density: float | None = None
) -> SparseRandomProjection:
    """Draw a projection, deterministically for one version of NumPy.

    Args:
        n_in: D, the number of features.
        n_out: K, for instance `johnson_lindenstrauss_dim(rows, eps)`.
        density: the share of nonzero entries; default: 1 / sqrt(D).

    Raises:
        ModelError: K outside 1..D, or a density outside (0, 1].
    """
    if not 1 <= n_out <= n_in <= MAX_WIDTH:
        raise ModelError(
            f"random projection reduces the number of columns: expected 1 to {n_in}, got {n_out}; "
            "a larger eps requires fewer columns, and PCA suits features this narrow"
        )
    density = 1 / sqrt(n_in) if density is None else density
    if not 0 < density <= 1:
        raise ModelError(f"the density of a random projection is above 0 and at most 1, got {density}")
    generator = np.random.default_rng(seed)
    counts = generator.binomial(n_in, density, n_out)
    rows = [np.sort(generator.choice(n_in, count, replace=False, shuffle=False)) for count in counts]
    columns = np.concatenate(rows).astype(np.int32)
    signs = generator.integers(0, 2, len(columns), np.int8) * np.int8(2) - np.int8(1)
    indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return SparseRandomProjection(n_in, indptr, columns, signs, 1 / sqrt(density * n_out), seed)


def random_projection_from_arrays(n_in: int, arrays: Arrays) -> SparseRandomProjection:
    """Restore a projection from untrusted arrays; all indices are checked, because sparse code does not check them.

    Raises:
        ModelError: an array is missing or of another type or shape, or an entry is not ±1 within K x D.
    """
    types = {"indptr": np.int64, "columns": np.int32, "signs": np.int8, "magnitude": np.float64, "seed": np.int64}
    for name, dtype in types.items():
        if name not in arrays:
            raise ModelError(f"array {name!r} is missing")
        if arrays[name].dtype != dtype or arrays[name].ndim != 1:
            got = f"{arrays[name].dtype} of shape {arrays[name].shape}"
            raise ModelError(f"array {name!r} should be {np.dtype(dtype)} in one dimension, got {got}")
    indptr, columns, signs, magnitude, seed = (arrays[name] for name in types)
    if len(magnitude) != 1 or len(seed) != 1 or not 0 < magnitude[0] <= _MAX_MAGNITUDE:
        raise ModelError("a random projection has one magnitude, above 0 and finite, and one seed")
    rows_fit = 2 <= len(indptr) <= n_in + 1 and indptr[0] == 0 and indptr[-1] == len(columns)  # noqa: PLR2004
    if not rows_fit or (np.diff(indptr) < 0).any():
        raise ModelError(f"the rows of the random projection do not divide its {len(columns)} entries")
    if len(signs) != len(columns) or not (np.abs(signs) == 1).all():
        raise ModelError("the entries of the random projection are not all 1 or -1")
    rising = np.diff(columns) > 0
    rising[indptr[1:-1][(indptr[1:-1] > 0) & (indptr[1:-1] < len(columns))] - 1] = True  # between two rows
    if len(columns) and (columns.min() < 0 or columns.max() >= n_in or not rising.all()):
        raise ModelError(f"the random projection has columns that are not ascending numbers from 0 to {n_in - 1}")
    return SparseRandomProjection(n_in, indptr, columns, signs, float(magnitude[0]), int(seed[0]))
