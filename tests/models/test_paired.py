"""The paired gain of one model over another: textbook cases, reference estimates and small holdouts."""

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from scipy.stats import beta, binom
from sklearn.metrics import f1_score

import models.paired as module
from models.paired import MAX_GROWTH, F1Gain, MeanGain, PairedCounts, gain_interval, images_needed


def accuracy(only_candidate: int, only_champion: int, same: int) -> MeanGain:
    return MeanGain(np.array([1.0, -1.0, 0.0]), np.array([only_candidate, only_champion, same]), 1.0)


def test_counts_of_images_and_their_gain() -> None:
    counts = PairedCounts(both=4, only_candidate=3, only_champion=1, neither=2)
    assert (counts.rows, counts.gain) == (10, 0.2)
    assert (PairedCounts().rows, PairedCounts().gain) == (0, 0)
    assert (accuracy(3, 1, 6).rows, accuracy(3, 1, 6).value, accuracy(0, 0, 0).value) == (10, 0.2, 0)
    assert type(accuracy(3, 1, 6).rows) is int
    assert PairedCounts(only_candidate=1).gain == accuracy(1, 0, 0).value == 1


@pytest.mark.parametrize(
    ("more", "less", "same"), [(6, 0, 200), (30, 17, 950), (5, 3, 2), (400, 300, 9300), (3, 0, 0), (1, 1, 2)]
)
def test_accuracy_gain_above_zero_is_the_exact_sign_test(more: int, less: int, same: int) -> None:
    expected = binom.sf(more - 1, more + less, 0.5)
    assert accuracy(more, less, same).p_value(0.0) == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize(("losses", "rows"), [(0, 5), (0, 59), (3, 13), (2, 1000)])
def test_bound_with_losses_only_is_clopper_pearson(losses: int, rows: int) -> None:
    expected = -beta.ppf(0.95, losses + 1, rows - losses)
    assert accuracy(0, losses, rows - losses).lower_bound(0.95) == pytest.approx(expected, abs=1e-7)


def test_bound_without_ties_is_clopper_pearson() -> None:
    for more, less in ((1, 9), (7, 3), (40, 60)):
        expected = 2 * beta.ppf(0.05, more, less + 1) - 1
        assert accuracy(more, less, 0).lower_bound(0.95) == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("unit", [1e-6, 1e6])
def test_p_value_is_independent_of_the_unit(unit: float) -> None:
    gain = MeanGain(unit * np.array([1.0, -1.0]), np.array([5, 3]), unit)
    assert gain.p_value(0.0) == pytest.approx(binom.sf(4, 8, 0.5), abs=1e-7)


def test_p_value_is_at_most_1() -> None:
    for margin in np.linspace(0, 0.99, 20):
        assert accuracy(1, 30, 100).p_value(float(margin)) <= 1


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
    assert accuracy(0, 2, 5).p_value(-1.0) == 0


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
    assert images_needed(gain, gain.value, 0.6) is None


@dataclass(frozen=True, eq=False)
class Shown(MeanGain):
    """A gain that is shown by this multiple of the images."""

    multiple: float = 1.0

    def p_value(self, margin: float, level: float = 0.0, growth: float = 1.0) -> float:
        return float(growth < self.multiple)


def test_images_needed_are_estimated_up_to_the_largest_multiple() -> None:
    for multiple in (1.5, 70.0, 0.6 * MAX_GROWTH, 0.9 * MAX_GROWTH):
        needed = images_needed(Shown(np.ones(1), np.array([100]), 1.0, multiple=multiple), 0.0, 0.05)
        assert needed == pytest.approx(100 * 1.01 * multiple, rel=0.01)
    assert images_needed(Shown(np.ones(1), np.array([100]), 1.0, multiple=1.1 * MAX_GROWTH), 0.0, 0.05) is None


def test_no_more_images_are_needed_than_show_the_gain() -> None:
    gain = accuracy(400, 17, 950)
    needed = images_needed(gain, 0.0, 0.025)
    assert needed is not None
    assert gain.rows <= needed <= 1.02 * gain.rows


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
    truth, ours, theirs = np.zeros(4, np.int64), np.array([0, 0, 0, 1]), np.zeros(4, np.int64)
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


@pytest.mark.parametrize("n_classes", [2, 4])
def test_f1_bound_without_disagreement_is_a_quantile_of_beta(n_classes: int) -> None:
    """Of C correct images and of pseudo-images with weight W, which the candidate misses or names wrongly.

    Its F1 is 2 C / (2 C + W), the champion's is 1, and W / (C + W) has a beta distribution.
    """
    truth = np.zeros(30, np.int64)
    gain = f1_gain(truth, truth, truth, n_classes, only=0)
    for level in (0.005, 0.5):
        ratio = beta.ppf(1 - level, 2 * 2 / n_classes, 30)  # two of the classes' equal parts of two pseudo-images
        error = 4 * np.sqrt(level * (1 - level) / max(1_000, 50 / level))
        assert gain.p_value(-ratio / (2 - ratio), level) == pytest.approx(level, abs=error)


def test_class_without_images_shows_no_f1_gain() -> None:
    truth, ours = np.zeros(500, np.int64), np.zeros(500, np.int64)
    assert f1_gain(truth, ours, ours, 2).lower_bound(0.95) < -0.4
    assert f1_gain(truth, ours, ours, 2, only=1).p_value(-0.99, 0.05) == 1
    assert f1_gain(np.zeros(0, np.int64), *[np.zeros(0, np.int64)] * 2, 2).value == 0


def test_samples_of_f1_are_scores_of_weighted_images_and_pseudo_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MIN_DRAWS", 9)
    monkeypatch.setattr(module, "DRAWS_BELOW", 1)
    gain = f1_gain(*answers(20, 3), 3)
    cells = np.concatenate([gain.cells, [[0, 1, 0], [1, 2, 1], [2, 0, 2]]])
    weights = np.random.default_rng(0).standard_gamma(np.append(gain.counts, [2 / 3] * 3), (9, len(cells)))
    expected = []
    for one in weights:
        ours, theirs = (f1_score(cells[:, 0], cells[:, by], average="macro", sample_weight=one) for by in (1, 2))
        expected.append(ours - theirs)
    for confidence in (0.25, 0.5, 0.75):
        assert gain.lower_bound(confidence) == pytest.approx(np.quantile(expected, 1 - confidence, method="lower"))


def test_p_value_of_f1_is_at_least_one_of_the_samples_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    gain = f1_gain(*answers(30, 3), 3)
    assert type(gain.rows) is int
    assert gain.p_value(-2.0, 0.5) == 1 / 1_001  # the minimum
    assert gain.p_value(-2.0, 1 / 64) == 1 / 3_201  # 50 below the level
    assert gain.p_value(2.0, 0.5) == 1
    confidence = 1 - 1 / 64
    assert gain.p_value(gain.lower_bound(confidence), 1 / 64) == 51 / 3_201  # the bound is the 50th sample
    n_cells = len(gain.cells) + 3
    monkeypatch.setattr(module, "MAX_CELLS_DRAWN", 2_000 * n_cells)
    assert gain.p_value(-2.0, 1 / 64) == 1 / 2_001


def test_f1_of_more_images_has_the_same_samples_as_larger_counts() -> None:
    gain = f1_gain(*answers(60, 3), 3)
    more = replace(gain, counts=4 * gain.counts)
    assert gain.p_value(0.0, 0.05, growth=4.0) == more.p_value(0.0, 0.05) != gain.p_value(0.0, 0.05)


@dataclass(frozen=True, eq=False)
class Recorded(F1Gain):
    """Records the number of samples in memory at a time."""

    sizes: list[int] = field(default_factory=list)

    def _gains(self, weights: np.ndarray, cells: np.ndarray) -> np.ndarray:
        assert len(weights) > 0
        self.sizes.append(len(weights))
        return super()._gains(weights, cells)


def test_samples_of_f1_are_drawn_in_parts_of_limited_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MIN_DRAWS", 10)
    monkeypatch.setattr(module, "DRAWS_BELOW", 5)
    names = np.zeros(1, np.int64)
    gain = Recorded(2, np.zeros((1, 3), np.int64), names + 9)  # three cells with those of the pseudo-images
    for held, sizes in ((11, [3, 3, 3, 1]), (1, [1] * 10)):
        monkeypatch.setattr(module, "MAX_CELLS_HELD", held)
        gain.sizes.clear()
        gain.lower_bound(0.5)
        assert gain.sizes == sizes


def test_interval_is_symmetric_in_the_two_models() -> None:
    low, high = gain_interval(accuracy(30, 17, 950), 0.95)
    assert (-high, -low) == pytest.approx(gain_interval(accuracy(17, 30, 950), 0.95), abs=1e-6)
    assert low < 13 / 997 < high
    truth, ours, theirs = answers(300, 3)
    low, high = gain_interval(f1_gain(truth, ours, theirs, 3), 0.95)
    assert low < f1_gain(truth, ours, theirs, 3).value < high
