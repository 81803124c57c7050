"""The drift test: Fisher's exact test at every edge, and windows that are judged seldom enough."""

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import fisher_exact

from models.drift import BINS, DriftReference, DriftSums
from models.drift_alarm import ENOUGH_ROWS, LEVEL, TEST_EVERY_S, TESTS_PER_DAY, DriftWindow, p_value, verdict

WIDTH = 5
TESTS = 2 * (WIDTH + 1) * (BINS - 1)


def images(seed: int, rows: int, shift: float = 0.0) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """((rows, 5) components, the first of them moved; (rows) confidences)."""
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
def test_the_p_value_is_the_least_of_fishers_exact_tests_times_their_number(
    reference: DriftReference, rows: int, shift: float
) -> None:
    seen = sums(reference, 2, rows, shift)
    least = 1.0
    for now, before in zip(seen.counts, reference.counts.astype(int), strict=True):
        for edge in range(1, BINS):
            table = [[now[:edge].sum(), now[edge:].sum()], [before[:edge].sum(), before[edge:].sum()]]
            least = min(least, *(fisher_exact(table, side).pvalue for side in ("less", "greater")))
    assert p_value(reference, seen) == pytest.approx(min(1.0, TESTS * least), rel=1e-6)


def test_a_confidence_that_falls_is_drift_too(reference: DriftReference) -> None:
    projected, _ = images(3, 500)
    seen = DriftSums.empty(WIDTH)
    seen.add(reference, projected, np.random.default_rng(3).uniform(0.4, 0.8, 500).astype(np.float32))
    assert verdict(reference, seen)["alarm"] == 1


def test_a_small_difference_is_no_alarm_however_certain_it_is(reference: DriftReference) -> None:
    wide = DriftReference.of(*images(4, 50_000))
    found = verdict(wide, sums(wide, 5, 50_000, 0.1))
    assert found["p_value"] < found["p_limit"] == LEVEL
    assert found["window_psi"] < 0.1
    assert found["alarm"] == 0
    assert verdict(reference, sums(reference, 5, 500, 2.0))["alarm"] == 1


def test_values_that_are_all_alike_are_no_drift() -> None:
    constant, sure = np.zeros((50, WIDTH), np.float32), np.ones(50, np.float32)
    reference = DriftReference.of(constant, sure)
    seen = DriftSums.empty(WIDTH)
    seen.add(reference, constant, sure)
    assert p_value(reference, seen) == 1
    other = DriftSums.empty(WIDTH)
    other.add(reference, constant + np.float32(1), sure)
    assert p_value(reference, other) < LEVEL


def test_a_reference_of_one_image_never_alarms() -> None:
    reference = DriftReference.of(*images(6, 1))
    assert verdict(reference, sums(reference, 7, 2_000, 5.0))["alarm"] == 0


def test_a_reference_of_training_images_is_not_judged_by(reference: DriftReference) -> None:
    former = DriftReference(**{**vars(reference), "held_out": False})
    seen = sums(reference, 8, 500, 3.0)
    assert p_value(former, seen) == 1
    assert DriftWindow().after("model", former, seen, 0.0)[1] == {}


def test_small_batches_fill_a_window_that_is_judged_every_few_minutes(reference: DriftReference) -> None:
    window, judged = DriftWindow(), []
    for number in range(60):  # 40 images a minute
        window, found = window.after("model", reference, sums(reference, number, 40), 60.0 * number)
        judged += [(number, found["window_rows"])] if found else []
    every = int(TEST_EVERY_S // 60)
    assert [number for number, _ in judged] == list(range(0, 60, every))
    sizes = [rows for _, rows in judged]
    assert sizes[:4] == [40, 240, 440, 640]  # until there are enough
    assert sizes[4] == 40 * every
    assert max(sizes) < ENOUGH_ROWS + 40 * every


def test_a_day_has_no_more_tests_than_its_level_allows_for(reference: DriftReference) -> None:
    window, judged = DriftWindow(), 0
    for second in range(0, 86_400, 20):
        window, found = window.after("model", reference, sums(reference, 9, 30), float(second))
        judged += bool(found)
    assert judged <= TESTS_PER_DAY


def test_a_window_is_of_one_model_and_a_swap_gives_no_extra_test(reference: DriftReference) -> None:
    other = DriftReference.of(*images(10, 700))
    window, first = DriftWindow().after("one", reference, sums(reference, 11, 100), 0.0)
    window, second = window.after("other", other, sums(other, 12, 100), 10.0)
    window, third = window.after("other", other, sums(other, 13, 100), TEST_EVERY_S)
    assert first["window_rows"] == 100
    assert second == {}
    assert third["window_rows"] == 200


def test_a_batch_that_is_not_committed_leaves_the_window_as_it_was(reference: DriftReference) -> None:
    window, _ = DriftWindow().after("model", reference, sums(reference, 14, 50), 0.0)
    batch = sums(reference, 15, 50)
    for _ in range(3):  # it comes again
        later, found = window.after("model", reference, batch, TEST_EVERY_S)
        assert found["window_rows"] == 100
    assert later.seen is not None
    assert batch.rows == 50


def test_a_handful_of_images_waits_for_more(reference: DriftReference) -> None:
    window, found = DriftWindow().after("model", reference, sums(reference, 16, 19), 0.0)
    assert found == {}
    assert window.after("model", reference, sums(reference, 17, 1), 1.0)[1]["window_rows"] == 20
