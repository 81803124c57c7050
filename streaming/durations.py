"""Parses and formats durations with a unit: `10s`, `15m`, `24h`, `7d`."""

import re

from streaming.errors import UsageError

UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3_600.0, "d": 86_400.0}
PATTERN = r"([0-9]{1,9}(?:\.[0-9]{1,6})?)(ms|s|m|h|d)?"


def parse_duration(
    text: str | float, *, plain: str | None = "s", min_s: float = 0.0, max_s: float = 366 * 86_400.0
) -> float:
    """Parse a duration such as 500ms, 10s, 15m, 24h or 7d, and return seconds.

    Args:
        plain: the unit of a number without a unit; None if a unit is required.
        min_s, max_s: the limits, inclusive.

    Raises:
        UsageError: it is not a valid duration, or outside the limits.
    """
    match = re.fullmatch(PATTERN, str(text).strip(), re.ASCII)
    unit = (match[2] or plain) if match else None
    seconds = float(match[1]) * UNITS[unit] if match and unit else -1.0
    if not min_s <= seconds <= max_s:
        raise UsageError(
            f"expected a time such as 10s, 15m, 24h or 7d, from {show_duration(min_s)} to {show_duration(max_s)}, "
            f"got {str(text)[:40]!r}"
        )
    return seconds


def show_duration(seconds: float) -> str:
    """Format a duration in the largest unit that gives an integer."""
    for unit in ("d", "h", "m"):
        if seconds and seconds % UNITS[unit] == 0:
            return f"{seconds / UNITS[unit]:.0f}{unit}"
    return f"{seconds:g}s"
