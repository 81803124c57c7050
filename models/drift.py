"""Drift: do the images that come look, to the model, like those that it was trained on?

Projected features are compared with a reference that the bundle keeps of the training images: per component mean,
spread, and the counts between the training images' deciles. The distance is the population stability index

    PSI = Σ (p − q) · ln(p / q)      over the ten bins, p the share now, q the share in training,

which credit scoring made customary with 0.1 as "look at it" and 0.25 as "it has changed" (N. Siddiqi, Credit Risk
Scorecards, 2006). It says little of a few images: with n of them a PSI of about 9 / n is chance.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from models.arrays import Arrays, Features, checked_array
from models.errors import ModelError

COMPONENTS = 64  # the first so many are watched; of a PCA they hold most of the variance
BINS = 10
LOW_CONFIDENCE = 0.5
MEANINGFUL_ROWS = 100  # of fewer images a distance says more of chance than of drift
PSEUDO_COUNT = 0.5  # of an image in every bin, so that an empty one has a logarithm


@dataclass(frozen=True)
class DriftReference:
    """The training images, as the classifier sees them.

    Attributes:
        rows: how many images it was made of.
        mean, std: (K) per watched component.
        edges: (K, BINS − 1) ascending: between which values the bins lie.
        counts: (K, BINS) training images per bin.
        low_confidence: the share of answers below `LOW_CONFIDENCE`.
    """

    rows: int
    mean: NDArray[np.float32]
    std: NDArray[np.float32]
    edges: NDArray[np.float32]
    counts: NDArray[np.float32]
    low_confidence: float

    @property
    def components(self) -> int:
        """K, how many components are watched."""
        return len(self.mean)

    @classmethod
    def of(cls, projected: Features, confidence: Features) -> Self:
        """Of (N, K') projected training images and the (N) probabilities of their best answers.

        Raises:
            ModelError: there are none.
        """
        if not len(projected):
            raise ModelError("a drift reference needs at least one image")
        watched = np.asarray(projected[:, :COMPONENTS], np.float32)
        edges = np.quantile(watched, np.arange(1, BINS) / BINS, axis=0).T.astype(np.float32)
        return cls(
            len(watched),
            watched.mean(axis=0, dtype=np.float64).astype(np.float32),
            watched.std(axis=0, dtype=np.float64).astype(np.float32),
            edges,
            _histogram(watched, edges).astype(np.float32),
            float(np.mean(confidence < LOW_CONFIDENCE)),
        )

    def to_arrays(self) -> Arrays:
        """As named arrays; `reference_from_arrays` reads them back."""
        return {
            "mean": self.mean,
            "std": self.std,
            "edges": self.edges,
            "counts": self.counts,
            "totals": np.array([self.rows, self.low_confidence], np.float64),
        }


def reference_from_arrays(width: int, arrays: Arrays) -> DriftReference:
    """The reference for a projection onto `width` components.

    Raises:
        ModelError: an array is missing or makes no sense.
    """
    k = min(width, COMPONENTS)
    totals = checked_array(arrays, "totals", (2,), np.float64)
    reference = DriftReference(
        int(totals[0]),
        checked_array(arrays, "mean", (k,), np.float32),
        checked_array(arrays, "std", (k,), np.float32),
        checked_array(arrays, "edges", (k, BINS - 1), np.float32),
        checked_array(arrays, "counts", (k, BINS), np.float32),
        float(totals[1]),
    )
    sound = (reference.std >= 0).all() and (reference.counts >= 0).all() and (np.diff(reference.edges) >= 0).all()
    if not sound or reference.rows < 1 or not 0 <= reference.low_confidence <= 1:
        raise ModelError("the drift reference makes no sense: spreads, counts, edges or totals are out of order")
    return reference


@dataclass
class DriftSums:
    """What is counted of the images that come; adds up over partitions.

    Attributes:
        rows: images.
        low: of them, answered with less than `LOW_CONFIDENCE`.
        total, squares: (K) sums of the watched components and of their squares.
        counts: (K, BINS) images per bin of the reference.
    """

    rows: int
    low: int
    total: NDArray[np.float64]
    squares: NDArray[np.float64]
    counts: NDArray[np.int64]

    @classmethod
    def empty(cls, components: int) -> Self:
        return cls(0, 0, np.zeros(components), np.zeros(components), np.zeros((components, BINS), np.int64))

    def add(self, reference: DriftReference, projected: Features, confidence: Features) -> None:
        """Count (N, K') projected images and the (N) probabilities of their best answers."""
        watched = projected[:, : reference.components].astype(np.float64)
        self.rows += len(watched)
        self.low += int(np.count_nonzero(confidence < LOW_CONFIDENCE))
        self.total += watched.sum(axis=0)
        self.squares += np.square(watched).sum(axis=0)
        self.counts += _histogram(projected[:, : reference.components], reference.edges)

    def merge(self, other: Self) -> None:
        self.rows += other.rows
        self.low += other.low
        self.total += other.total
        self.squares += other.squares
        self.counts += other.counts

    def as_json(self) -> dict[str, Any]:
        return {name: value if isinstance(value, int) else value.tolist() for name, value in vars(self).items()}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        return cls(
            content["rows"],
            content["low"],
            np.asarray(content["total"], np.float64),
            np.asarray(content["squares"], np.float64),
            np.asarray(content["counts"], np.int64).reshape(-1, BINS),
        )


def drift(reference: DriftReference, seen: DriftSums) -> dict[str, float]:
    """How far what was seen is from the reference; empty where nothing was.

    Returns:
        `psi_max` and `psi_mean` over the components, `component`, the one that `psi_max` is of, `mean_shift`, the
        largest difference of means in training spreads, `spread`, the ratio of spreads farthest from 1, and
        `low_confidence`, the share of low answers, with `low_confidence_in_training` beside it.
    """
    if not seen.rows:
        return {}
    psi = _psi(seen.counts, reference.counts)
    mean = seen.total / seen.rows
    spread = np.sqrt(np.maximum(seen.squares / seen.rows - mean**2, 0.0))
    unit = np.maximum(reference.std.astype(np.float64), np.finfo(np.float32).tiny)
    varies = reference.std > 0
    ratio = np.where(varies, spread / unit, 1.0)
    farthest = np.abs(np.log(np.maximum(ratio, 1e-9))).argmax()
    return {
        "rows": float(seen.rows),
        "psi_max": float(psi.max()),
        "psi_mean": float(psi.mean()),
        "component": float(psi.argmax()),
        "mean_shift": float(np.where(varies, np.abs(mean - reference.mean) / unit, 0.0).max()),
        "spread": float(ratio[farthest]),
        "low_confidence": seen.low / seen.rows,
        "low_confidence_in_training": reference.low_confidence,
    }


def _psi(now: NDArray[Any], before: NDArray[Any]) -> NDArray[np.float64]:
    """(K) indices of (K, BINS) counts."""
    p, q = (_shares(counts) for counts in (now, before))
    return np.asarray(((p - q) * np.log(p / q)).sum(axis=1), np.float64)


def _shares(counts: NDArray[Any]) -> NDArray[np.float64]:
    smoothed = counts.astype(np.float64) + PSEUDO_COUNT
    return np.asarray(smoothed / smoothed.sum(axis=1, keepdims=True), np.float64)


def _histogram(values: Features, edges: NDArray[np.float32]) -> NDArray[np.int64]:
    """(K, BINS) counts of (N, K) values: bin b holds those above edge b − 1 and up to edge b."""
    bins = (values[:, :, None] > edges[None]).sum(axis=2)  # (N, K), 0 to BINS − 1
    components = np.arange(len(edges)) * BINS
    flat = np.bincount((bins + components).reshape(-1), minlength=len(edges) * BINS)
    return flat.reshape(len(edges), BINS).astype(np.int64)
