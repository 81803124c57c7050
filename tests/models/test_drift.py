"""Drift metrics: close to zero for images like the reference, and growing with the difference."""

import json
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from models.arrays import read_npz, write_npz
from models.drift import BINS, COMPONENTS, DriftReference, DriftSums, drift, reference_from_arrays
from models.errors import ModelError

WIDTH = 80


def images(seed: int, rows: int = 4_000, shift: float = 0.0, spread: float = 1.0) -> NDArray[np.float32]:
    """Components (rows, 80), the first one shifted and scaled."""
    values = np.random.default_rng(seed).normal(size=(rows, WIDTH))
    values[:, 0] = values[:, 0] * spread + shift
    return values.astype(np.float32)


def confidence(rows: int, low: float) -> NDArray[np.float32]:
    return np.where(np.arange(rows) < low * rows, 0.3, 0.9).astype(np.float32)


@pytest.fixture(scope="module")
def reference() -> DriftReference:
    return DriftReference.of(images(1), confidence(4_000, 0.1))


def sums_of(reference: DriftReference, values: NDArray[np.float32], low: float = 0.1) -> DriftSums:
    """The sums of the images, merged from two halves as from two partitions."""
    sure = confidence(len(values), low)
    halves = []
    for half in (slice(None, None, 2), slice(1, None, 2)):
        sums = DriftSums.empty(reference.components)
        sums.add(reference, values[half], sure[half])
        halves.append(DriftSums.from_json(json.loads(json.dumps(sums.as_json()))))
    halves[0].merge(halves[1])
    return halves[0]


def test_similar_images_show_no_drift(reference: DriftReference) -> None:
    found = drift(reference, sums_of(reference, images(2)))
    assert found["rows"] == 4_000
    assert found["psi_max"] < 0.03
    assert found["mean_shift"] < 0.1
    assert 0.9 < found["spread"] < 1.1
    assert found["psi_mean"] == pytest.approx(found["psi_expected"], rel=0.2)
    assert found["low_confidence"] == pytest.approx(found["low_confidence_in_training"], abs=1e-9)


def test_psi_matches_its_definition(reference: DriftReference) -> None:
    values = images(3, shift=0.5)
    found = drift(reference, sums_of(reference, values))
    edges = np.quantile(images(1)[:, 0], np.arange(1, BINS) / BINS)
    before, _ = np.histogram(images(1)[:, 0], [-np.inf, *edges, np.inf])
    now, _ = np.histogram(values[:, 0], [-np.inf, *edges, np.inf])
    p, q = now / now.sum(), before / before.sum()
    assert found["psi_max"] == pytest.approx(float(((p - q) * np.log(p / q)).sum()), rel=0.02)
    assert found["component"] == 0


@pytest.mark.parametrize("shift", [0.5, 1.0, 2.0])
def test_mean_shift_is_in_standard_deviations_of_the_reference(reference: DriftReference, shift: float) -> None:
    found = drift(reference, sums_of(reference, images(4, shift=shift)))
    assert found["mean_shift"] == pytest.approx(shift, abs=0.1)
    assert found["psi_max"] > 0.2 * shift
    assert found["psi_mean"] < found["psi_max"]


@pytest.mark.parametrize("spread", [0.25, 3.0])
def test_change_of_spread_is_measured(reference: DriftReference, spread: float) -> None:
    found = drift(reference, sums_of(reference, images(5, spread=spread)))
    assert found["spread"] == pytest.approx(spread, rel=0.1)
    assert found["psi_max"] > 0.25


def test_low_confidence_predictions_are_counted(reference: DriftReference) -> None:
    assert drift(reference, sums_of(reference, images(6), low=0.4))["low_confidence"] == pytest.approx(0.4)


@pytest.mark.parametrize("n_classes", [2, 10, 1000])
def test_low_confidence_is_comparable_for_any_number_of_classes(n_classes: int) -> None:
    """With two classes, confidence is at least one half: the limit is the lowest decile of the reference."""
    generator = np.random.default_rng(8)
    certain = (1 + (n_classes - 1) * generator.beta(2, 2, 4_000)) / n_classes
    doubtful = (1 + (n_classes - 1) * generator.beta(1, 3, 4_000)) / n_classes
    reference = DriftReference.of(images(1), certain.astype(np.float32))
    sums = DriftSums.empty(COMPONENTS)
    sums.add(reference, images(2), doubtful.astype(np.float32))
    found = drift(reference, sums)
    assert found["low_confidence_in_training"] == pytest.approx(0.1, abs=0.001)
    assert found["low_confidence"] > 0.3


def test_no_images_give_no_drift(reference: DriftReference) -> None:
    assert drift(reference, DriftSums.empty(reference.components)) == {}


def test_constant_component_gives_finite_metrics() -> None:
    constant = np.zeros((50, 3), np.float32)
    found = DriftReference.of(constant, confidence(50, 0.0))
    values = drift(found, sums_of(found, constant + np.float32(1.0)))
    assert all(np.isfinite(value) for value in values.values())
    assert values["psi_max"] > 1


def test_reference_round_trips_through_npz(reference: DriftReference) -> None:
    again = reference_from_arrays(WIDTH, read_npz(write_npz(reference.to_arrays()), "drift.npz"))
    assert again.components == COMPONENTS
    assert drift(again, sums_of(again, images(7))) == drift(reference, sums_of(reference, images(7)))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("std", np.full(COMPONENTS, -1, np.float32)),
        ("edges", np.zeros((COMPONENTS, BINS), np.float32)),
        ("edges", np.tile(np.arange(BINS - 1, 0, -1, dtype=np.float32), (COMPONENTS, 1))),
        ("counts", np.full((COMPONENTS, BINS), -1, np.float32)),
        ("totals", np.array([0.0, 0.5])),
        ("totals", np.array([10.0, 2.0])),
        ("totals", np.array([np.nan, 0.1])),
        ("totals", np.array([3_000.0, 0.1])),
        ("confidence_edges", np.full(BINS - 2, 0.5, np.float32)),
        ("confidence_counts", np.full(BINS, -1, np.float32)),
        ("mean", np.full(COMPONENTS, np.nan, np.float32)),
    ],
)
def test_invalid_reference_is_rejected(reference: DriftReference, name: str, value: NDArray[np.float32]) -> None:
    with pytest.raises(ModelError):
        reference_from_arrays(WIDTH, reference.to_arrays() | {name: value})


def older_arrays(reference: DriftReference) -> dict[str, NDArray[Any]]:
    """Arrays as in older bundles: the reference is of training images and has no confidence histogram."""
    arrays = {name: value for name, value in reference.to_arrays().items() if not name.startswith("confidence")}
    return arrays | {"totals": np.array([reference.rows, 0.004])}


def test_reference_from_training_images_still_loads(reference: DriftReference) -> None:
    old = reference_from_arrays(WIDTH, older_arrays(reference))
    assert not old.held_out
    found, new = (drift(one, sums_of(one, images(7), low=0.4)) for one in (old, reference))
    assert found["psi_max"] == new["psi_max"]
    assert (found["low_confidence"], found["low_confidence_in_training"]) == (0.4, pytest.approx(0.004))


def test_empty_reference_is_rejected() -> None:
    with pytest.raises(ModelError, match="at least one image"):
        DriftReference.of(np.empty((0, 3), np.float32), np.empty(0, np.float32))
