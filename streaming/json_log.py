"""JSON logs for `log_format = json`: one object per line, with its time in UTC, for all commands.

`streaming.pipeline.observe` writes the stream's events with their figures; this module converts the output of all
commands, and records of Python's `logging`.
"""

import io
import json
import logging
from datetime import UTC, datetime
from typing import IO, Any

ERROR = "error: "  # the prefix of a command's error line
TEXT = "%(asctime)s %(levelname)s %(message)s"


def line_of(level: str, event: str, at: datetime | None = None, **fields: Any) -> str:
    """A line of the log, without a line break."""
    timestamp = (at or datetime.now(UTC)).isoformat().replace("+00:00", "Z")
    return json.dumps({"timestamp": timestamp, "level": level, "event": event, **fields})


class JsonLines(io.TextIOBase):
    """A text stream that writes each line as JSON to another stream; empty lines are left out."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._begun = ""

    def write(self, text: str) -> int:
        """Write complete lines, and buffer the rest."""
        *lines, self._begun = (self._begun + text).split("\n")
        for line in filter(str.strip, lines):
            level = "error" if line.startswith(ERROR) else "info"
            self._stream.write(line_of(level, line.removeprefix(ERROR).rstrip()) + "\n")
        return len(text)

    def flush(self) -> None:
        """Flush the underlying stream; an incomplete line stays in the buffer."""
        self._stream.flush()


class JsonFormatter(logging.Formatter):
    """Formats a record of `logging` as a line of JSON, with the traceback as a field."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        more = {"exception": self.formatException(record.exc_info)} if record.exc_info else {}
        at = datetime.fromtimestamp(record.created, UTC)
        return line_of(record.levelname.lower(), record.getMessage(), at, **more)


def log_to_stderr(format_: str, *loggers: str) -> None:
    """Write loggers to standard error in the format of the setting, and nowhere else.

    Unlike `logging.config`, this does not close the handlers of other loggers: absl's, which exists in a process with
    TensorFlow, closes its stream.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if format_ == "json" else logging.Formatter(TEXT))
    for name in loggers:
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
