"""Coverage of the confidence intervals in reports: 93 to 97 % for a nominal 95 %."""

import numpy as np
import pytest
from numpy.typing import NDArray

from models.evaluation import FEW_ROWS, Evaluation
from tests.forms import Form, Record

ZIPF = [1 / rank / sum(1 / one for one in range(1, 11)) for rank in range(1, 11)]


def model_of(shares: list[float], recalls: list[float]) -> NDArray[np.float64]:
    """(K, K) probabilities of truth and answer; errors are uniform over the other classes."""
    size = len(shares)
    rows = [np.full(size, (1 - recall) / (size - 1)) for recall in recalls]
    for number, recall in enumerate(recalls):
        rows[number][number] = recall
    return np.array(shares)[:, None] * np.array(rows)


def macro_f1(confusion: NDArray[np.float64], occurring: NDArray[np.bool_]) -> float:
    named = confusion.sum(axis=0) + confusion.sum(axis=1)
    return float((2 * np.diag(confusion) / named)[occurring].mean())


def coverage(chances: NDArray[np.float64], n: int, draws: int, seed: int) -> tuple[float, float]:
    """(fraction of intervals that contain macro F1 over the occurring classes, their mean width)."""
    size, generator, covered, width = len(chances), np.random.default_rng(seed), 0, 0.0
    for _ in range(draws):
        confusion = generator.multinomial(n, chances.reshape(-1)).reshape(size, size)
        found = Evaluation(tuple(map(str, range(size))), confusion)
        low, high = found.macro_f1_interval()
        covered += low <= macro_f1(chances, found.occurring) <= high
        width += high - low
    return covered / draws, width / draws


@pytest.mark.parametrize(
    ("name", "shares", "recalls", "sizes"),
    [
        ("two", [0.5, 0.5], [0.9, 0.9], [50, 100, 300, 1000]),
        ("two, one rare, 5 %", [0.95, 0.05], [0.95, 0.7], [100, 300, 1000]),
        ("two, one rare, 10 %", [0.9, 0.1], [0.97, 0.8], [50, 100, 300, 1000]),
        ("three, one rare, 5 %", [0.6, 0.35, 0.05], [0.95, 0.9, 0.6], [100, 300, 1000]),
        ("ten, few errors", [0.1] * 10, [0.99] * 10, [100, 300, 1000]),
        ("ten, many errors", [0.1] * 10, [0.7] * 10, [100, 300, 1000]),
        ("ten, Zipf-distributed", ZIPF, [0.85] * 10, [300, 1000]),
        ("a hundred", [0.01] * 100, [0.8] * 100, [1000, 3000]),
    ],
)
def test_macro_f1_interval_has_nominal_coverage(
    name: str, shares: list[float], recalls: list[float], sizes: list[int], form: Form[int], seed: int, record: Record
) -> None:
    draws = form(10_000, 400) if len(shares) < 100 else form(1_000, 100)
    chances = model_of(shares, recalls)
    found = [coverage(chances, n, draws, seed) for n in form(sizes, sizes[:1])]
    text = " ".join(f"{n}: {share:.1%} ±{width / 2:.3f}" for n, (share, width) in zip(sizes, found, strict=False))
    record(f"macro F1's interval, {name}", "93 to 97 %", text)
    slack = 3 * np.sqrt(0.05 / draws)
    assert all(0.93 - slack <= share <= 0.97 + slack for share, _ in found)


def test_classes_too_rare_for_the_interval_are_counted(form: Form[int], seed: int, record: Record) -> None:
    """Ten Zipf-distributed classes, fifty images: the rarest class has two, and the interval covers too rarely."""
    share, _ = coverage(model_of(ZIPF, [0.85] * 10), 50, form(10_000, 400), seed)
    record("macro F1's interval, classes with 1 to 4 rows", "not claimed", f"{share:.1%}")
    assert 0.8 < share < 0.95
    confusion = np.diag([FEW_ROWS, FEW_ROWS - 1, 1, 0, 20])
    confusion[0, 3] = 1  # predicted, but never the truth
    assert Evaluation(tuple("abcde"), confusion).rare_classes == 3


def test_interval_of_ten_images_without_errors_is_wide() -> None:
    for counts in ([5, 5], [10, 0], [4, 3, 3], [1] * 10):
        found = Evaluation(tuple(map(str, range(len(counts)))), np.diag(counts))
        assert 0.55 < found.macro_f1_interval().low < 0.85
        assert found.macro_f1_interval().high == pytest.approx(1)


@pytest.mark.parametrize("share", [0.5, 0.8, 0.95])
def test_accuracy_interval_has_nominal_coverage(share: float, form: Form[int], seed: int, record: Record) -> None:
    generator, draws, seen = np.random.default_rng(seed), form(100_000, 5_000), []
    for n in (100, 300, 1000):
        correct, times = np.unique(generator.binomial(n, share, draws), return_counts=True)
        covered = 0
        for one, number in zip(correct, times, strict=True):
            low, high = Evaluation(("a", "b"), np.array([[one, n - one], [0, 0]])).accuracy_interval()
            covered += number * (low <= share <= high)
        seen.append(covered / draws)
    record(f"accuracy's interval, accuracy {share}", "93 to 97 %", " ".join(f"{one:.1%}" for one in seen))
    slack = 3 * np.sqrt(0.05 / draws)
    assert all(0.93 - slack <= one <= 0.97 + slack for one in seen)
