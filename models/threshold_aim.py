"""How the decision threshold is chosen; parsed by the command line, so without NumPy."""

import math
from dataclasses import dataclass

from models.errors import ModelError


@dataclass(frozen=True, slots=True)
class ThresholdAim:
    """How the threshold is chosen: `fixed`, by the minimum cost if `costs` are set, or else by the maximum F1.

    Attributes:
        costs: of a false positive (predicting the second class for the first) and of a false negative.
    """

    fixed: float | None = None
    costs: tuple[float, float] | None = None


def parse_threshold(text: str) -> ThresholdAim:
    """Parse `0.7`, `f1` or `cost:1:5` (of a false positive, of a false negative).

    Raises:
        ModelError: anything else, a threshold that is not between 0 and 1, or a cost that is not positive.
    """
    name, *numbers = text.strip().lower().split(":")
    if name == "f1" and not numbers:
        return ThresholdAim()
    try:
        values = [float(number) for number in (numbers if name == "cost" else [name, *numbers])]
    except ValueError:
        values = []
    if name == "cost" and len(values) == 2 and all(0 < value < math.inf for value in values):  # noqa: PLR2004
        return ThresholdAim(costs=(values[0], values[1]))
    if name != "cost" and len(values) == 1 and 0 < values[0] < 1:
        return ThresholdAim(fixed=values[0])
    raise ModelError(
        "expected a threshold between 0 and 1, f1, or cost:FP:FN with the costs of a false positive and a "
        f"false negative, such as cost:1:5; got {text!r}"
    )
