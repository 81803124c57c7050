"""The drift alarm: Fisher's exact test at every bin edge, on windows that are tested at a limited rate."""

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import fisher_exact

from models.drift import BINS, DriftReference, DriftSums
from models.drift_alarm import ENOUGH_ROWS, LEVEL, TEST_EVERY_S, TESTS_PER_DAY, DriftWindow, p_value, verdict

WIDTH = 5
TESTS = 2 * (WIDTH + 1) * (BINS - 1)


def images(seed: int, rows: int, shift: float = 0.0) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Components (rows, 5), the first one shifted, and confidences (rows)."""
    generator = np.random.default_rng(seed)
    values = generator.normal(size=(rows, WIDTH))
    values[:, 0] += shift
    return values.astype(np.float32), generator.uniform(0.5, 1, rows).astype(np.float32)


@pytest.fixture(scope="module")
def reference() -> DriftReference:
    return DriftReference.of(*images(1, 1_000))


def sums(reference: DriftReference, seed: int, rows: int, shift: float = 0.0) -> DriftSums:
    found = DriftSums.empty(WIDTH)
    found.add(reference, *images(seed, rows, shift))
    return found


@pytest.mark.parametrize(("rows", "shift"), [(20, 1.5), (100, -1.0), (500, 0.4), (2_000, 0.2)])
def test_p_value_is_the_bonferroni_corrected_minimum_of_fishers_exact_tests(
    reference: DriftReference, rows: int, shift: float
) -> None:
    seen = sums(reference, 2, rows, shift)
    least = 1.0
    for now, before in zip(seen.counts, reference.counts.astype(int), strict=True):
        for edge in range(1, BINS):
            table = [[now[:edge].sum(), now[edge:].sum()], [before[:edge].sum(), before[edge:].sum()]]
            least = min(least, *(fisher_exact(table, side).pvalue for side in ("less", "greater")))
    assert p_value(reference, seen) == pytest.approx(min(1.0, TESTS * least), rel=1e-6)


def test_falling_confidence_raises_an_alarm(reference: DriftReference) -> None:
    projected, _ = images(3, 500)
    seen = DriftSums.empty(WIDTH)
    seen.add(reference, projected, np.random.default_rng(3).uniform(0.4, 0.8, 500).astype(np.float32))
    assert verdict(reference, seen)["alarm"] == 1


def test_significant_but_small_difference_raises_no_alarm(reference: DriftReference) -> None:
    wide = DriftReference.of(*images(4, 50_000))
    found = verdict(wide, sums(wide, 5, 50_000, 0.1))
    assert found["p_value"] < found["p_limit"] == LEVEL
    assert found["window_psi"] < 0.1
    assert found["alarm"] == 0
    assert verdict(reference, sums(reference, 5, 500, 2.0))["alarm"] == 1


def test_constant_values_are_no_drift() -> None:
    constant, sure = np.zeros((50, WIDTH), np.float32), np.ones(50, np.float32)
    reference = DriftReference.of(constant, sure)
    seen = DriftSums.empty(WIDTH)
    seen.add(reference, constant, sure)
    assert p_value(reference, seen) == 1
    other = DriftSums.empty(WIDTH)
    other.add(reference, constant + np.float32(1), sure)
    assert p_value(reference, other) < LEVEL


def test_reference_of_one_image_never_raises_an_alarm() -> None:
    reference = DriftReference.of(*images(6, 1))
    assert verdict(reference, sums(reference, 7, 2_000, 5.0))["alarm"] == 0


def test_reference_from_training_images_is_not_tested_against(reference: DriftReference) -> None:
    older = DriftReference(**{**vars(reference), "held_out": False})
    seen = sums(reference, 8, 500, 3.0)
    assert p_value(older, seen) == 1
    assert DriftWindow().after("model", older, seen, 0.0)[1] == {}


def test_small_batches_accumulate_in_a_window_tested_every_few_minutes(reference: DriftReference) -> None:
    window, tested = DriftWindow(), []
    for number in range(60):  # 40 images a minute
        window, found = window.after("model", reference, sums(reference, number, 40), 60.0 * number)
        tested += [(number, found["window_rows"])] if found else []
    every = int(TEST_EVERY_S // 60)
    assert [number for number, _ in tested] == list(range(0, 60, every))
    sizes = [rows for _, rows in tested]
    assert sizes[:4] == [40, 240, 440, 640]  # until the window has enough rows
    assert sizes[4] == 40 * every
    assert max(sizes) < ENOUGH_ROWS + 40 * every


def test_number_of_tests_per_day_is_bounded(reference: DriftReference) -> None:
    window, tested = DriftWindow(), 0
    for second in range(0, 86_400, 20):
        window, found = window.after("model", reference, sums(reference, 9, 30), float(second))
        tested += bool(found)
    assert tested <= TESTS_PER_DAY


def test_window_restarts_at_a_model_swap_without_an_extra_test(reference: DriftReference) -> None:
    other = DriftReference.of(*images(10, 700))
    window, first = DriftWindow().after("one", reference, sums(reference, 11, 100), 0.0)
    window, second = window.after("other", other, sums(other, 12, 100), 10.0)
    window, third = window.after("other", other, sums(other, 13, 100), TEST_EVERY_S)
    assert first["window_rows"] == 100
    assert second == {}
    assert third["window_rows"] == 200


def test_uncommitted_batch_leaves_the_window_unchanged(reference: DriftReference) -> None:
    window, _ = DriftWindow().after("model", reference, sums(reference, 14, 50), 0.0)
    batch = sums(reference, 15, 50)
    for _ in range(3):  # it is retried
        later, found = window.after("model", reference, batch, TEST_EVERY_S)
        assert found["window_rows"] == 100
    assert later.seen is not None
    assert batch.rows == 50


def test_window_is_not_tested_below_20_images(reference: DriftReference) -> None:
    window, found = DriftWindow().after("model", reference, sums(reference, 16, 19), 0.0)
    assert found == {}
    assert window.after("model", reference, sums(reference, 17, 1), 1.0)[1]["window_rows"] == 20
