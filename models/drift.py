"""Drift detection: do incoming images look, to the model, like those that it was evaluated on?

The bundle contains a reference of held-out images: per projected component the mean, the standard deviation and a
histogram with the deciles as edges; and the same histogram of the confidence. Training images are unsuitable: a model
is more confident on images that it was fitted on, and a PCA of few images fits them better. The distance is the
population stability index

    PSI = Σ (p − q) · ln(p / q)      over the ten bins, p the share now, q the share in the reference,

common in credit scoring (N. Siddiqi, Credit Risk Scorecards, 2006). For n images and a reference of m images, its
expected value without drift is about 9 · (1/n + 1/m), so its customary limits, 0.1 and 0.25, mean little for few
images: `models.drift_alarm` decides whether there is drift.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from models.arrays import Arrays, Features, checked_array
from models.errors import ModelError

COMPONENTS = 64  # the first components are monitored; those of a PCA explain most of the variance
BINS = 10
MEANINGFUL_ROWS = 100  # for fewer images, the distance is dominated by chance
FORMER_LOW_CONFIDENCE = 0.5  # in older bundles, whose reference is of training images
PSEUDO_COUNT = 0.5  # added to every bin, so that the logarithm of an empty one is finite


@dataclass(frozen=True)
class DriftReference:
    """Statistics of held-out images as the classifier sees them.

    Attributes:
        rows: the number of images.
        mean, std: (K) per monitored component.
        edges: (K + 1, BINS − 1) ascending edges of the bins; the last row is that of the confidence.
        counts: (K + 1, BINS) images per bin; bin b contains the values above edge b − 1 and up to edge b.
        held_out: whether the images were held out; False in bundles of an earlier format.
    """

    rows: int
    mean: NDArray[np.float32]
    std: NDArray[np.float32]
    edges: NDArray[np.float32]
    counts: NDArray[np.float32]
    held_out: bool = True

    @property
    def components(self) -> int:
        """K, the number of monitored components."""
        return len(self.mean)

    @classmethod
    def of(cls, projected: Features, confidence: Features) -> Self:
        """Compute the reference.

        Args:
            projected: (N, K') projected held-out images.
            confidence: (N) probabilities of their most probable class.

        Raises:
            ModelError: there are no images.
        """
        if not len(projected):
            raise ModelError("a drift reference needs at least one image")
        watched = np.asarray(projected[:, :COMPONENTS], np.float32)
        values = np.column_stack([watched, np.asarray(confidence, np.float32)])
        # Edges are observed values: the distribution of such order statistics is known.
        edges = np.quantile(values, np.arange(1, BINS) / BINS, axis=0, method="inverted_cdf").T.astype(np.float32)
        return cls(
            len(watched),
            watched.mean(axis=0, dtype=np.float64).astype(np.float32),
            watched.std(axis=0, dtype=np.float64).astype(np.float32),
            edges,
            _histogram(values, edges).astype(np.float32),
        )

    @property
    def low_confidence(self) -> float:
        """The share of predictions in the lowest bin of the confidence: a tenth, or more if many are equal."""
        return float(self.counts[-1, 0]) / self.rows

    def to_arrays(self) -> Arrays:
        """Named arrays for `reference_from_arrays`."""
        return {
            "mean": self.mean,
            "std": self.std,
            "edges": self.edges[:-1],
            "counts": self.counts[:-1],
            "confidence_edges": self.edges[-1],
            "confidence_counts": self.counts[-1],
            "totals": np.array([self.rows, self.low_confidence], np.float64),
        }


def reference_from_arrays(width: int, arrays: Arrays) -> DriftReference:
    """Restore the reference of a projection onto `width` components.

    In the earlier format it is of training images, with the share of confidences below `FORMER_LOW_CONFIDENCE` in place
    of a histogram.

    Raises:
        ModelError: an array is missing or invalid.
    """
    k = min(width, COMPONENTS)
    rows, low = checked_array(arrays, "totals", (2,), np.float64)
    if not 1 <= rows < np.inf or not 0 <= low <= 1:
        raise ModelError(f"the drift reference is invalid: {rows} images, a share of {low} of low confidence")
    held_out = "confidence_edges" in arrays
    if held_out:
        confidence_edges = checked_array(arrays, "confidence_edges", (BINS - 1,), np.float32)
        confidence_counts = checked_array(arrays, "confidence_counts", (BINS,), np.float32)
    else:
        confidence_edges = np.full(BINS - 1, FORMER_LOW_CONFIDENCE, np.float32)
        confidence_counts = np.array([low * rows, *[0] * (BINS - 2), (1 - low) * rows], np.float32)
    reference = DriftReference(
        int(rows),
        checked_array(arrays, "mean", (k,), np.float32),
        checked_array(arrays, "std", (k,), np.float32),
        np.vstack([checked_array(arrays, "edges", (k, BINS - 1), np.float32), confidence_edges]),
        np.vstack([checked_array(arrays, "counts", (k, BINS), np.float32), confidence_counts]),
        held_out,
    )
    sound = (reference.std >= 0).all() and (reference.counts >= 0).all() and (np.diff(reference.edges) >= 0).all()
    # Counts are float32: those of the earlier format need not be integers.
    if not sound or not np.allclose(reference.counts.sum(axis=1, dtype=np.float64), reference.rows, atol=0.5):
        raise ModelError("the drift reference is invalid: spreads, counts or edges are out of order")
    return reference


@dataclass
class DriftSums:
    """Accumulated statistics of incoming images, which merge over partitions and micro-batches.

    Attributes:
        rows: the number of images.
        total, squares: (K) sums of the monitored components and of their squares.
        counts: (K + 1, BINS) images per bin of the reference.
    """

    rows: int
    total: NDArray[np.float64]
    squares: NDArray[np.float64]
    counts: NDArray[np.int64]

    @classmethod
    def empty(cls, components: int) -> Self:
        return cls(0, np.zeros(components), np.zeros(components), np.zeros((components + 1, BINS), np.int64))

    @classmethod
    def merged(cls, components: int, parts: Iterable[Mapping[str, Any]]) -> Self:
        """Merge the parts returned by `as_json`."""
        sums = cls.empty(components)
        for part in parts:
            sums.merge(cls.from_json(part))
        return sums

    def add(self, reference: DriftReference, projected: Features, confidence: Features) -> None:
        """Add (N, K') projected images and the (N) probabilities of their most probable class."""
        watched = np.asarray(projected[:, : reference.components], np.float32)
        wide = watched.astype(np.float64)
        self.rows += len(watched)
        self.total += wide.sum(axis=0)
        self.squares += np.square(wide).sum(axis=0)
        self.counts += _histogram(np.column_stack([watched, np.asarray(confidence, np.float32)]), reference.edges)

    def merge(self, other: Self) -> None:
        self.rows += other.rows
        self.total += other.total
        self.squares += other.squares
        self.counts += other.counts

    def as_json(self) -> dict[str, Any]:
        return {name: value if isinstance(value, int) else value.tolist() for name, value in vars(self).items()}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        return cls(
            content["rows"],
            np.asarray(content["total"], np.float64),
            np.asarray(content["squares"], np.float64),
            np.asarray(content["counts"], np.int64).reshape(-1, BINS),
        )


def drift(reference: DriftReference, seen: DriftSums) -> dict[str, float]:
    """Measure how far incoming images are from the reference; empty if there are none.

    Returns:
        `psi_max` and `psi_mean` over the components; `component`, that of `psi_max`; `psi_expected`, the expected
        `psi_mean` without drift; `mean_shift`, the largest difference of means in standard deviations of the reference;
        `spread`, the ratio of standard deviations farthest from 1; `low_confidence`, the share of predictions with a
        confidence in the lowest decile of the reference; and `low_confidence_in_training`, that share in the reference.
    """
    if not seen.rows:
        return {}
    psi = psi_of(seen.counts, reference.counts)[:-1]
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
        "psi_expected": (BINS - 1) * (1 / seen.rows + 1 / reference.rows),
        "component": float(psi.argmax()),
        "mean_shift": float(np.where(varies, np.abs(mean - reference.mean) / unit, 0.0).max()),
        "spread": float(ratio[farthest]),
        "low_confidence": float(seen.counts[-1, 0] / seen.rows),
        "low_confidence_in_training": reference.low_confidence,
    }


def psi_of(now: NDArray[Any], before: NDArray[Any]) -> NDArray[np.float64]:
    """Population stability indices (K,) of histograms (K, BINS)."""
    p, q = (_shares(counts) for counts in (now, before))
    return np.asarray(((p - q) * np.log(p / q)).sum(axis=1), np.float64)


def _shares(counts: NDArray[Any]) -> NDArray[np.float64]:
    smoothed = counts.astype(np.float64) + PSEUDO_COUNT
    return np.asarray(smoothed / smoothed.sum(axis=1, keepdims=True), np.float64)


def _histogram(values: Features, edges: NDArray[np.float32]) -> NDArray[np.int64]:
    """Histograms (K, BINS) of (N, K) values: bin b counts those above edge b − 1 and up to edge b."""
    bins = (values[:, :, None] > edges[None]).sum(axis=2)  # (N, K), 0 to BINS − 1
    components = np.arange(len(edges)) * BINS
    flat = np.bincount((bins + components).reshape(-1), minlength=len(edges) * BINS)
    return flat.reshape(len(edges), BINS).astype(np.int64)
