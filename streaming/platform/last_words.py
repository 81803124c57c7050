"""What a JVM said last in its log, in one line."""

import re

SAYS_NOTHING = "A fatal exception has occurred|Could not create the Java Virtual Machine"  # said after the reason


def telling_line(said: str) -> str:
    """The last line that names an error, or else the last one."""
    lines = [line.strip() for line in said.splitlines() if line.strip() and not re.search(SAYS_NOTHING, line)]
    errors = [line for line in lines if re.search(r"\b(ERROR|FATAL)\b|Exception|Error:", line) and line[:3] != "at "]
    return (errors or lines or ["it said nothing"])[-1][:300]
