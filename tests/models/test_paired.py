"""The paired gain of one model over another: textbook cases, reference estimates and small holdouts."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import beta, binom
from sklearn.metrics import f1_score

from models.paired import F1Gain, MeanGain, PairedCounts, gain_interval, images_needed


def accuracy(only_candidate: int, only_champion: int, same: int) -> MeanGain:
    return MeanGain(np.array([1.0, -1.0, 0.0]), np.array([only_candidate, only_champion, same]), 1.0)


def test_counts_of_images_and_their_gain() -> None:
    counts = PairedCounts(both=4, only_candidate=3, only_champion=1, neither=2)
    assert (counts.rows, counts.gain) == (10, 0.2)
    assert (PairedCounts().rows, PairedCounts().gain) == (0, 0)
    assert (accuracy(3, 1, 6).rows, accuracy(3, 1, 6).value, accuracy(0, 0, 0).value) == (10, 0.2, 0)
    assert type(accuracy(3, 1, 6).rows) is int


@pytest.mark.parametrize(("more", "less", "same"), [(6, 0, 200), (30, 17, 950), (5, 3, 2), (400, 300, 9300), (3, 0, 0)])
def test_accuracy_gain_above_zero_is_the_exact_sign_test(more: int, less: int, same: int) -> None:
    expected = binom.sf(more - 1, more + less, 0.5)
    assert accuracy(more, less, same).p_value(0.0) == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize(("losses", "rows"), [(0, 5), (0, 59), (3, 13), (2, 1000)])
def test_bound_with_losses_only_is_clopper_pearson(losses: int, rows: int) -> None:
    expected = -beta.ppf(0.95, losses + 1, rows - losses)
    assert accuracy(0, losses, rows - losses).lower_bound(0.95) == pytest.approx(expected, abs=1e-7)


def test_bound_matches_the_paired_bootstrap_for_many_images() -> None:
    values = np.random.default_rng(0).normal(0.02, 0.3, 400)
    counts = np.random.default_rng(1).integers(1, 60, 400)
    gain = MeanGain(values, counts, 6.9)
    drawn = np.random.default_rng(2).multinomial(gain.rows, counts / gain.rows, 4_000) @ values / gain.rows
    assert gain.value == pytest.approx(drawn.mean(), abs=2e-4)
    for confidence in (0.9, 0.975, 0.999):
        assert gain.lower_bound(confidence) == pytest.approx(np.quantile(drawn, 1 - confidence), abs=3e-3)


@pytest.mark.parametrize("gain", [accuracy(6, 2, 90), MeanGain(np.array([5.0, -1.0]), np.array([30, 60]), 5.0)])
def test_bound_is_where_the_p_value_equals_one_minus_the_confidence(gain: MeanGain) -> None:
    for confidence in (0.5, 0.95, 0.999):
        low = gain.lower_bound(confidence)
        assert gain.p_value(low) == pytest.approx(1 - confidence, abs=1e-6)
        assert gain.p_value(low - 0.01) < 1 - confidence < gain.p_value(low + 0.01)


@pytest.mark.parametrize("gain", [accuracy(0, 0, 0), accuracy(0, 9, 0)])
def test_no_images_or_only_losses_give_the_trivial_bound(gain: MeanGain) -> None:
    assert gain.lower_bound(0.95) == -1
    assert gain.p_value(0.0) == 1


def test_gain_exceeds_the_largest_loss_and_no_gain_the_largest_gain() -> None:
    assert (accuracy(3, 2, 5).p_value(-1.0), accuracy(3, 2, 5).p_value(1.0)) == (0, 1)


def test_tiny_holdout_without_disagreement_is_inconclusive() -> None:
    gain = accuracy(0, 0, 5)
    assert gain.p_value(-0.05) > 0.7
    assert images_needed(gain, -0.05, 0.05) == 59  # 0.95 ** 59 < 0.05
    assert accuracy(0, 0, 58).p_value(-0.05) > 0.05 > accuracy(0, 0, 59).p_value(-0.05)


def test_images_needed_reaches_the_confidence() -> None:
    gain = accuracy(30, 17, 950)
    needed = images_needed(gain, 0.0, 0.025)
    assert needed is not None
    assert gain.p_value(0.0, growth=needed / gain.rows) < 0.025 < gain.p_value(0.0, growth=0.95 * needed / gain.rows)
    assert images_needed(gain, 0.0, 0.001) > needed  # type: ignore[operator]
    for margin in (gain.value, 0.02):
        assert images_needed(gain, margin, 0.025) is None


def f1_gain(truth: np.ndarray, ours: np.ndarray, theirs: np.ndarray, n_classes: int, only: int | None = None) -> F1Gain:
    cells, counts = np.unique(np.stack([truth, ours, theirs], axis=1), axis=0, return_counts=True)
    return F1Gain(n_classes, cells, counts, only)


def answers(n: int, n_classes: int) -> list[np.ndarray]:
    generator = np.random.default_rng(5)
    truth = generator.integers(0, n_classes, n)
    return [truth, *(np.where(generator.random(n) < 0.8, truth, generator.integers(0, n_classes, n)) for _ in range(2))]


def test_f1_gain_is_the_difference_of_two_scores() -> None:
    truth, ours, theirs = answers(300, 4)
    expected = f1_score(truth, ours, average="macro") - f1_score(truth, theirs, average="macro")
    assert f1_gain(truth, ours, theirs, 4).value == pytest.approx(expected)
    assert f1_gain(truth, theirs, ours, 4).value == pytest.approx(-expected)
    assert f1_gain(truth, ours, theirs, 9).value == pytest.approx(expected)  # classes that do not occur
    two = [part % 2 for part in (truth, ours, theirs)]
    expected = f1_score(two[0], two[1]) - f1_score(two[0], two[2])
    assert f1_gain(*two, 2, only=1).value == pytest.approx(expected)


def test_f1_gain_counts_classes_that_only_one_model_predicts() -> None:
    truth, ours, theirs = np.zeros(4, np.int64), np.array([0, 0, 1, 1]), np.zeros(4, np.int64)
    expected = [f1_score(truth, one, average="macro", labels=[0, 1], zero_division=0) for one in (ours, theirs)]
    assert f1_gain(truth, ours, theirs, 3).value == pytest.approx(expected[0] - expected[1])
    assert f1_gain(truth, theirs, ours, 3).value == pytest.approx(expected[1] - expected[0])


def test_swapped_gain_is_that_of_the_champion() -> None:
    truth, ours, theirs = answers(300, 4)
    gain, swapped = f1_gain(truth, ours, theirs, 4), f1_gain(truth, theirs, ours, 4)
    assert gain.swapped().value == swapped.value == pytest.approx(-gain.value)
    assert gain.swapped().lower_bound(0.95) == pytest.approx(swapped.lower_bound(0.95), abs=4e-3)
    assert accuracy(3, 1, 6).swapped().value == -0.2


def test_heavier_pseudo_image_lowers_the_bound_and_halves_give_the_interval() -> None:
    truth, ours, theirs = answers(60, 3)
    for gain in (accuracy(5, 2, 30), f1_gain(truth, ours, theirs, 3)):
        bounds = [replace(gain, extra=extra).lower_bound(0.975) for extra in (0.5, 1.0, 2.0)]
        assert bounds[0] > bounds[1] > bounds[2]
        assert gain.lower_bound(0.975) == bounds[1]
        high = -replace(gain, extra=0.5).swapped().lower_bound(0.975)
        assert gain_interval(gain, 0.95) == (bounds[0], high)


def test_f1_bound_matches_the_paired_bootstrap_for_many_images() -> None:
    truth, ours, theirs = answers(1_500, 4)
    generator = np.random.default_rng(0)
    drawn = []
    for _ in range(300):
        rows = generator.integers(0, len(truth), len(truth))
        drawn.append(f1_gain(truth[rows], ours[rows], theirs[rows], 4).value)
    gain = f1_gain(truth, ours, theirs, 4)
    assert gain.lower_bound(0.95) == pytest.approx(np.quantile(drawn, 0.05), abs=6e-3)
    assert gain.lower_bound(0.95) == gain.lower_bound(0.95)
    assert gain.p_value(gain.lower_bound(0.95), 0.05) == pytest.approx(0.05, abs=0.01)


def test_class_without_images_shows_no_f1_gain() -> None:
    truth, ours = np.zeros(500, np.int64), np.zeros(500, np.int64)
    assert f1_gain(truth, ours, ours, 2).lower_bound(0.95) < -0.4
    assert f1_gain(np.zeros(0, np.int64), *[np.zeros(0, np.int64)] * 2, 2).value == 0


def test_interval_is_symmetric_in_the_two_models() -> None:
    low, high = gain_interval(accuracy(30, 17, 950), 0.95)
    assert (-high, -low) == pytest.approx(gain_interval(accuracy(17, 30, 950), 0.95), abs=1e-6)
    assert low < 13 / 997 < high
    truth, ours, theirs = answers(300, 3)
    low, high = gain_interval(f1_gain(truth, ours, theirs, 3), 0.95)
    assert low < f1_gain(truth, ours, theirs, 3).value < high
