"""Error rates of the gate: candidates that do not exceed the margin are promoted in at most 5 % of cases.

For accuracy the rate is computed: the probabilities of the outcomes (numbers of images that only one model classifies
correctly) that lead to a promotion are summed. The other objectives are simulated.
"""

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import binom, norm

from models.objective import Objective
from models.paired import F1Gain, Gain, MeanGain, PairedCounts
from streaming.training.fit_options import GateOptions
from streaming.training.gate import Paired, confidence_of_look, decide
from tests.forms import Form, Record

ALPHA = 0.05
OUTCOMES = np.array([1.0, -1.0, 0.0])  # correct by the candidate only, by the champion only, by both or neither
COSTS = Objective("cost", (1.0, 5.0))
LOG_LOSS = Objective("log_loss")


def promoted(gain: Gain, margin: float, objective: Objective, look: int = 1) -> bool:
    return decide(Paired(objective, PairedCounts(), gain), GateOptions(margin=margin), look).promote


def rejected(gain: Gain, margin: float, level: float = ALPHA) -> bool:
    """Whether a single look with the total error level would not promote."""
    return gain.p_value(margin, level) >= level


def fewest_gains(n: int, margin: float, most_losses: int) -> NDArray[np.int64]:
    """For 0, 1, … images correct by the champion only: the minimum correct by the candidate only for a promotion."""

    def passes(gains: int, losses: int) -> bool:
        counts = np.array([gains, losses, n - gains - losses])
        return not rejected(MeanGain(OUTCOMES, counts, 1.0), margin)

    fewest: list[int] = []
    for losses in range(min(n, most_losses) + 1):
        low, high, step = (fewest[-1] if fewest else 0) - 1, n - losses + 1, 1  # more losses never need fewer gains
        while low + step < high:  # search for the last one that fails, with doubling steps
            if passes(low + step, losses):
                high = low + step
                break
            low, step = low + step, 2 * step
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if passes(middle, losses) else (middle, high)
        fewest.append(high)
    return np.array(fewest)


def promotion_rate(fewest: NDArray[np.int64], n: int, gains: float, losses: float) -> float:
    """The probability of these outcomes for given fractions of images that are correct by one model only."""
    each = np.arange(len(fewest))
    return float(binom.pmf(each, n, losses) @ binom.sf(fewest - 1, n - each, min(1.0, gains / (1 - losses))))


@pytest.mark.parametrize("margin", [-0.3, -0.05, -0.02, 0.0, 0.02])
def test_candidate_at_the_margin_is_promoted_in_at_most_five_percent(
    margin: float, form: Form[list[int]], record: Record
) -> None:
    worst = 0.0
    for n in form([1, 2, 3, 5, 8, 12, 20, 40, 58, 59, 60, 100, 200, 500, 2000], [1, 5, 20, 60, 200]):
        losses = max(0.0, -margin) + np.array([0.0, 0.001, 0.003, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3])
        losses = losses[2 * losses + margin < 1]
        fewest = fewest_gains(n, margin, int(min(n, n * losses.max() + 6 * np.sqrt(n))))
        worst = max(worst, *(promotion_rate(fewest, n, one + margin, one) for one in losses))
    record(f"gate, accuracy, margin {margin}: promoted in error", "≤ 5 %, any number of images", f"{worst:.2%}")
    assert worst <= ALPHA


def test_five_images_without_disagreement_do_not_show_noninferiority(record: Record) -> None:
    """Without the added image, a candidate that is worse by .05 passes if no image shows it: in 77 % of cases."""
    rate = promotion_rate(fewest_gains(5, -0.05 + 1e-9, 5), 5, 0.0, 0.05)
    record("gate, 5 images, worse by the margin .05", "≤ 5 % (77 % without the added image)", f"{rate:.2%}")
    assert 0.95**5 > 0.77
    assert rate <= ALPHA


@pytest.mark.parametrize(("n", "gains", "losses", "least"), [(500, 0.06, 0.02, 0.9), (1000, 0.06, 0.03, 0.9)])
def test_power_is_close_to_theory(n: int, gains: float, losses: float, least: float, record: Record) -> None:
    power = promotion_rate(fewest_gains(n, 0.0, n // 10), n, gains, losses)
    spread = np.sqrt(gains + losses - (gains - losses) ** 2)
    # The normal approximation (Connor 1987, "Sample Size for Testing Differences in Proportions for the
    # Paired-Sample Design", Biometrics 43).
    critical = norm.ppf(1 - ALPHA) * np.sqrt(gains + losses)
    theory = norm.cdf((np.sqrt(n) * (gains - losses) - critical) / spread)
    record(f"gate, power at {gains - losses:+.0%} on {n} images", f"≥ {least:.0%}, theory {theory:.1%}", f"{power:.1%}")
    assert power > least
    assert power > theory - 0.05


def scored(generator: np.random.Generator, n: int) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """(whether an image is of the second class, its probability): one in ten is, and the classes overlap."""
    second = generator.random(n) < 0.1
    odds = generator.normal(np.where(second, 1.0, -1.0), 1.0) * 2 + np.log(0.1 / 0.9)
    return second, 1 / (1 + np.exp(-odds))


def compared(
    second: NDArray[np.bool_], ours: NDArray[np.bool_], theirs: NDArray[np.bool_], objective: Objective
) -> MeanGain:
    loss = np.where(second, *reversed(objective.costs)) if objective.costs else np.ones(len(second))
    values, counts = np.unique(loss * ((ours == second) * 1.0 - (theirs == second)), return_counts=True)
    return MeanGain(values, counts, objective.most)


def test_costlier_candidate_is_not_promoted_despite_higher_accuracy(form: Form[int], seed: int, record: Record) -> None:
    """One model at two thresholds: the best one for cost:1:5, and one half."""
    generator, runs = np.random.default_rng(seed), form(100, 30)
    by_accuracy = by_cost = reverse = 0
    for _ in range(runs):
        second, chance = scored(generator, 2000)
        by_threshold, at_half = chance >= 1 / 6, chance >= 1 / 2
        by_accuracy += promoted(compared(second, at_half, by_threshold, Objective()), 0.0, Objective())
        by_cost += promoted(compared(second, at_half, by_threshold, COSTS), 0.0, COSTS)
        reverse += promoted(compared(second, by_threshold, at_half, COSTS), 0.0, COSTS)
    record(
        "gate, champion at cost:1:5, candidate at one half",
        "refused by cost; the reverse promoted",
        f"promoted by accuracy {by_accuracy / runs:.0%}, by cost {by_cost / runs:.0%}; reverse {reverse / runs:.0%}",
    )
    assert by_accuracy / runs > 0.5  # the comparison that would be wrong
    assert by_cost == 0
    assert reverse / runs > 0.9


@pytest.mark.parametrize("shape", ["symmetric", "rare large losses", "rare large gains"])
def test_candidate_of_equal_cost_is_promoted_in_at_most_five_percent(
    shape: str, form: Form[int], seed: int, record: Record
) -> None:
    values = np.array([1.0, -1.0, 5.0, -5.0, 0.0])
    rare = {
        "symmetric": (0.05, 0.05, 0.01, 0.01),
        "rare large losses": (0.1, 0.0, 0.0, 0.02),
        "rare large gains": (0.0, 0.1, 0.02, 0.0),
    }[shape]
    generator, draws, worst = np.random.default_rng(seed), form(20_000, 1_000), 0.0
    for n in form([10, 100, 300, 1000, 5000], [10, 300]):
        found, times = np.unique(generator.multinomial(n, [*rare, 1 - sum(rare)], draws), axis=0, return_counts=True)
        chosen = [not rejected(MeanGain(values, counts, 5.0), 0.0) for counts in found[:4000]]
        worst = max(worst, float(times[:4000] @ chosen / times[:4000].sum()))
    record(f"gate, cost:1:5, {shape}: promoted in error", "≤ 5 %", f"{worst:.2%}")
    assert worst <= ALPHA + 3 * np.sqrt(ALPHA / min(draws, 4000))


@pytest.mark.parametrize("shape", ["symmetric", "rare large losses"])
def test_candidate_of_equal_log_loss_is_promoted_in_at_most_five_percent(
    shape: str, form: Form[int], seed: int, record: Record
) -> None:
    generator, draws, worst = np.random.default_rng(seed), form(400, 100), 0.0
    for n in form([20, 100, 500, 2000], [20, 500]):
        hits = 0
        for _ in range(draws):
            if shape == "symmetric":
                ours, theirs = np.minimum(3 * generator.exponential(0.3, (2, n)) ** 2, LOG_LOSS.most)
                values = np.round(theirs - ours, 2)
            else:
                values = np.where(generator.random(n) < 0.01, -4.95, 0.05)
            hits += not rejected(MeanGain(*np.unique(values, return_counts=True), LOG_LOSS.most), 0.0)
        worst = max(worst, hits / draws)
    record(f"gate, log loss, {shape}: promoted in error", "≤ 5 %", f"{worst:.2%}")
    assert worst <= ALPHA + 3 * np.sqrt(ALPHA / draws)


RARE = [0.6, 0.37, 0.03]


@pytest.mark.parametrize(
    ("shares", "ours", "theirs"),
    [
        ([0.95, 0.05], [0.95, 0.7], [0.95, 0.7]),
        ([0.95, 0.05], [0.97, 0.4], [0.97, 0.8]),  # worse in the rare class
        (RARE, [0.95, 0.9, 0.6], [0.95, 0.9, 0.6]),
        (RARE, [0.97, 0.95, 0.2], [0.97, 0.95, 0.8]),
        ([0.1] * 10, [0.8] * 10, [0.8] * 10),
        ([0.1] * 10, [0.97] * 10, [0.98] * 10),
    ],
    ids=["two", "two, worse", "rare", "rare, worse", "ten", "ten, worse"],
)
def test_candidate_at_the_macro_f1_margin_is_promoted_in_at_most_five_percent(
    shares: list[float], ours: list[float], theirs: list[float], form: Form[int], seed: int, record: Record
) -> None:
    cells, chances = most_similar(shares, ours, theirs)
    margin = F1Gain(len(shares), cells, np.round(chances * 1e9).astype(np.int64)).value
    generator, draws, worst = np.random.default_rng(seed), form(500, 60), 0.0
    for n in form([20, 60, 100, 300, 1000], [20, 300]):
        hits = 0
        for _ in range(draws):
            counts = generator.multinomial(n, chances)
            seen = counts > 0
            hits += not rejected(F1Gain(len(shares), cells[seen], counts[seen]), margin)
        worst = max(worst, hits / draws)
    record(f"gate, macro F1, margin {margin:.3f}: promoted in error", "≤ 5 %", f"{worst:.2%}")
    assert worst <= ALPHA + 3 * np.sqrt(ALPHA / draws)


def most_similar(
    shares: list[float], ours: list[float], theirs: list[float]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """(truth, answer, answer) and their probabilities, for models with these recalls and maximum agreement."""
    size = len(shares)
    cells = np.stack(np.meshgrid(*[np.arange(size)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    chances = []
    for share, *recalls in zip(shares, ours, theirs, strict=True):
        truth = len(chances)
        first, second = (np.full(size, (1 - recall) / (size - 1)) for recall in recalls)
        first[truth], second[truth] = recalls
        alike = 0.9 * np.minimum(first, second)
        both = np.outer(first - alike, second - alike) / (1 - alike.sum()) + np.diag(alike)
        chances.append(share * both)
    return cells, np.array(chances).reshape(-1)


def test_twenty_equal_candidates_replace_the_champion_in_at_most_five_percent(
    form: Form[int], seed: int, record: Record
) -> None:
    """Twenty candidates as good as the champion, on one holdout; at 95 % each, one passes in half of the cases."""
    generator, runs, looks, n = np.random.default_rng(seed), form(1000, 150), 20, 500
    once = bounded = 0
    for _ in range(runs):
        # The champion's errors on this holdout; each candidate has separate errors in the remaining images.
        wrong = generator.binomial(n, 0.1)
        gains = generator.binomial(wrong, 0.5, looks)
        losses = generator.binomial(n - wrong, 0.05 / 0.9, looks)
        found = [
            MeanGain(OUTCOMES, np.array([g, b, n - g - b]), 1.0).p_value(0.0)
            for g, b in zip(gains, losses, strict=True)
        ]
        once += any(doubt < ALPHA for doubt in found)
        bounded += any(doubt < 1 - confidence_of_look(1 - ALPHA, look) for look, doubt in enumerate(found, 1))
    record(
        "gate, 20 equal candidates on one holdout",
        "≤ 5 % replace the champion",
        f"{bounded / runs:.1%}; {once / runs:.1%} with 5 % per look",
    )
    assert bounded / runs <= ALPHA + 3 * np.sqrt(ALPHA / runs)
    assert once / runs > 0.2


def test_total_error_of_all_looks_is_bounded() -> None:
    assert sum(1 - confidence_of_look(0.95, look) for look in range(1, 10_000)) < 0.05


@pytest.mark.parametrize(("gains", "losses"), [(0.08, 0.05), (0.02, 0.02), (0.01, 0.03)])
def test_gain_interval_has_nominal_coverage(
    gains: float, losses: float, form: Form[int], seed: int, record: Record
) -> None:
    generator, draws, seen = np.random.default_rng(seed), form(20_000, 600), []
    for n in form([250, 500, 1000, 4000], [500]):
        found, times = np.unique(
            generator.multinomial(n, [gains, losses, 1 - gains - losses], draws), axis=0, return_counts=True
        )
        covered = 0
        for counts, number in zip(found, times, strict=True):
            gain = MeanGain(OUTCOMES, counts, 1.0, extra=0.5)  # as on each side of `gain_interval`
            doubt = min(gain.p_value(gains - losses), gain.swapped().p_value(losses - gains))
            covered += number * (doubt >= 0.025)
        seen.append(covered / draws)
    text = " ".join(f"{share:.1%}" for share in seen)
    record(f"report, gain of {gains - losses:+.0%}: covered", "93 to 97 %", text)
    slack = 2 * np.sqrt(0.05 / draws)
    assert all(0.93 - slack <= share <= 0.97 + slack for share in seen)
