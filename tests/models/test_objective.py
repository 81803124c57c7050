"""The objective that a model is optimised for: parsing, defaults and limits."""

import math

import pytest

from models.errors import ModelError
from models.objective import Objective, parse_objective, resolve_objective


@pytest.mark.parametrize("text", ["accuracy", "cost:1:5", "cost:0.5:1e+16", "f1", "macro_f1", "log_loss"])
def test_objective_round_trips_through_text(text: str) -> None:
    assert str(parse_objective(text)) == text
    assert str(parse_objective(f" {text.upper()} ")) == text


def test_cost_without_values_uses_the_costs_of_the_threshold() -> None:
    assert parse_objective("cost", "cost:1:5") == Objective("cost", (1.0, 5.0))
    for threshold in (None, "f1", "0.3"):
        with pytest.raises(ModelError, match="cost:FP:FN .or cost, with a threshold"):
            parse_objective("cost", threshold)


@pytest.mark.parametrize("text", ["auc", "", "cost:1", "cost:0:1", "cost:1:inf", "f1:2", "macro f1"])
def test_invalid_objective_is_rejected(text: str) -> None:
    with pytest.raises(ModelError, match="got "):
        parse_objective(text)


@pytest.mark.parametrize(
    ("metric", "threshold", "expected"),
    [
        (None, None, None),
        (None, "0.3", None),  # a fixed threshold optimises nothing
        (None, "f1", "f1"),
        (None, "cost:1:5", "cost:1:5"),
        ("accuracy", "cost:1:5", "accuracy"),
        ("cost", "cost:2:5", "cost:2:5"),
    ],
)
def test_objective_defaults_to_what_the_threshold_optimises(
    metric: str | None, threshold: str | None, expected: str | None
) -> None:
    found = resolve_objective(metric, threshold)
    assert (found and str(found)) == expected


def test_costs_round_trip_through_text() -> None:
    costs = (1 / 3, 123456.789)
    assert parse_objective(str(Objective("cost", costs))).costs == costs


def test_unreachable_margin_is_rejected() -> None:
    for objective, most in ((Objective(), 1), (Objective("cost", (1, 5)), 5), (Objective("log_loss"), math.log(1000))):
        objective.check_margin(0.99 * most)
        for margin in (most, -most, math.nan):
            with pytest.raises(ModelError, match="a margin of .* is between -"):
                objective.check_margin(margin)


def test_cost_and_f1_require_two_classes() -> None:
    for objective in (Objective("cost", (1, 5)), Objective("f1")):
        objective.check_classes(2)
        with pytest.raises(ModelError, match="requires two classes, got 3; use --metric accuracy"):
            objective.check_classes(3)
    Objective("macro_f1").check_classes(3)
