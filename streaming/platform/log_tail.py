"""Finds the last error in a JVM's log."""

import re

UNINFORMATIVE = "A fatal exception has occurred|Could not create the Java Virtual Machine"  # printed after the reason


def error_line(log: str) -> str:
    """The last line with an error, or else the last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip() and not re.search(UNINFORMATIVE, line)]
    errors = [line for line in lines if re.search(r"\b(ERROR|FATAL)\b|Exception|Error:", line) and line[:3] != "at "]
    return (errors or lines or ["no output"])[-1][:300]
