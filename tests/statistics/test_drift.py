"""Drift: simulated false alarms per day and power of the complete procedure, with its reference and windows."""

import numpy as np
import pytest
from numpy.typing import NDArray

from models.drift import DriftReference, DriftSums, drift
from models.drift_alarm import ENOUGH_ROWS, TEST_EVERY_S, DriftWindow, p_value
from tests.forms import Form, Record

COMPONENTS = 64
HELD_OUT = 1000
BATCHES_A_DAY = int(86_400 / TEST_EVERY_S)
Values = NDArray[np.float32]


class Population:
    """Simulated images: components that are uncorrelated but dependent, and a confidence.

    All components of an image share a random scale, as those of a PCA may: all components of an outlier are large. The
    last one is zero in most images, like a feature after a ReLU.
    """

    def __init__(self, seed: int) -> None:
        self.generator = np.random.default_rng(seed)

    def images(self, n: int, shift: float = 0.0) -> tuple[Values, Values]:
        """((n, 64) components with unit variance, the first one shifted by `shift`; (n) confidences)."""
        scale = np.sqrt(self.generator.gamma(4, 1 / 4, (n, 1)))
        components = self.generator.normal(size=(n, COMPONENTS)) * scale
        components[:, -1] = np.maximum(components[:, -1] - 0.5, 0)
        confidence = 1 / (1 + np.exp(-2 - components[:, 0] - self.generator.normal(size=n)))
        components[:, 0] += shift
        return components.astype(np.float32), confidence.astype(np.float32)

    def reference(self, n: int = HELD_OUT) -> DriftReference:
        return DriftReference.of(*self.images(n))

    def batch(self, reference: DriftReference, n: int, shift: float = 0.0) -> DriftSums:
        sums = DriftSums.empty(COMPONENTS)
        sums.add(reference, *self.images(n, shift))
        return sums


def day(population: Population, n: int, batches: int) -> tuple[bool, bool]:
    """Whether a day of batches of n images without drift gives an alarm, by the test and by a fixed limit of 0.25.

    A batch comes as often as a window is tested: more frequent batches would only make the windows larger.
    """
    reference, window = population.reference(), DriftWindow()
    alarm = former = False
    for number in range(batches):
        batch = population.batch(reference, n)
        window, verdict = window.after("model", reference, batch, number * TEST_EVERY_S)
        alarm |= bool(verdict["alarm"])
        former |= drift(reference, batch)["psi_max"] > 0.25
    return alarm, former


@pytest.mark.parametrize("n", [20, 50, 100, 200, 500, 1000, 2000])
def test_days_without_drift_rarely_alarm(form: Form[int], seed: int, record: Record, n: int) -> None:
    days, batches = form(100 if n <= 500 else 50, 2), form(BATCHES_A_DAY, 40)
    population = Population(seed + n)
    found = np.array([day(population, n, batches) for _ in range(days)])
    alarms, former = found.mean(axis=0)
    record(f"drift: days with a false alarm, batches of {n}", "≤ 1 %", f"{alarms:.1%}; PSI > 0.25: {former:.0%}")
    # With a rate of 1 %, more than 5 of 100 days have an alarm in 1 of 1,800 runs, and one of the two days of the short
    # form, which are a seventh as long, in 1 of 350.
    assert found[:, 0].sum() <= form(5, 0)
    if n <= 100:
        assert former > 0.9, "if a fixed limit does not fail here, the simulation proves nothing"


def test_p_value_is_conservative(form: Form[int], seed: int, record: Record) -> None:
    """At levels that a simulation can estimate, for windows and references of several sizes."""
    population, runs = Population(seed), form(4000, 100)
    for n, m in ((20, 1000), (100, 100), (500, 1000), (1000, 200)):
        found = np.empty(runs)
        for run in range(runs):
            reference = population.reference(m)
            found[run] = p_value(reference, population.batch(reference, n))
        for level in (0.2, 0.05, 0.01):
            rate = float((found <= level).mean())
            record(f"drift: p ≤ {level}, {n} images, reference of {m}", f"≤ {level:.0%}", f"{rate:.1%}")
            assert rate <= level + 3 * np.sqrt(level * (1 - level) / runs)


@pytest.mark.parametrize(("shift", "n"), [(0.5, ENOUGH_ROWS), (1.0, 100), (1.5, 50)])
def test_shift_of_one_component_is_detected(form: Form[int], seed: int, record: Record, shift: float, n: int) -> None:
    """The mean of one of 64 components shifts by `shift` standard deviations; window: n images, reference: 1,000."""
    population, runs = Population(seed), form(500, 40)
    alarms = 0
    for _ in range(runs):
        reference = population.reference()
        _, verdict = DriftWindow().after("model", reference, population.batch(reference, n, shift), 0.0)
        alarms += bool(verdict["alarm"])
    record(f"drift: power, shift of {shift} σ, {n} images", "≥ 80 %", f"{alarms / runs:.1%}")
    assert alarms / runs >= 0.8 - 3 * np.sqrt(0.16 / runs)


def test_shift_in_small_batches_is_detected_within_the_window(form: Form[int], seed: int, record: Record) -> None:
    """A shift of half a standard deviation in batches of 20 images: the window grows until it is large enough."""
    population, runs = Population(seed), form(200, 10)
    needed = []
    for _ in range(runs):
        reference, window = population.reference(), DriftWindow()
        for number in range(4 * ENOUGH_ROWS // 20):
            window, verdict = window.after(
                "model", reference, population.batch(reference, 20, 0.5), number * TEST_EVERY_S
            )
            if verdict["alarm"]:
                needed.append(20 * (number + 1))
                break
    median = float(np.median(needed)) if needed else np.inf
    record(
        "drift: shift of 0.5 σ in batches of 20",
        "detected in 2,000 images",
        f"{len(needed)} of {runs}, median {median:.0f}",
    )
    assert len(needed) / runs >= 0.9 - 3 * np.sqrt(0.09 / runs)
