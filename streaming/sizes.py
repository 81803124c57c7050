"""Parses sizes in Spark's notation."""

from streaming.errors import UsageError

UNITS = {"k": 1024, "m": 1024**2, "g": 1024**3, "t": 1024**4}


def parse_size(text: str) -> int:
    """Parse a size such as 512m or 2g, by default in bytes, and return bytes.

    Raises:
        ServiceError: it is not a valid size.
    """
    digits, unit = text.rstrip("kmgtbKMGTB"), text.lower().lstrip("0123456789").rstrip("b")
    if not digits.isdecimal() or unit not in {"", *UNITS}:
        raise UsageError(f"expected a size such as 512m or 2g, got {text!r}")
    return int(digits) * UNITS.get(unit, 1)
