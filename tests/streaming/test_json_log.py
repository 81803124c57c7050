"""The log as JSON: standard error of commands, and records of `logging`."""

import io
import json
import logging
import sys
from contextlib import redirect_stderr
from datetime import datetime
from pathlib import Path

import pytest

from streaming.cli import app as cli
from streaming.cli import commands  # noqa: F401  registers every command
from streaming.json_log import JsonFormatter, JsonLines


@pytest.mark.parametrize(
    ("command", "why"),
    [
        (["stream", "--bootstrap-servers", "nowhere"], "nowhere"),
        (["publish", "missing.jpg"], "missing.jpg"),
        (["models", "show", "1"], "there is no model version 1"),
        (["audit"], "nothing to audit"),
        (["retrain"], "there is no champion model"),
        (["report"], "no predictions yet"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_error_of_a_failed_command_is_a_json_line_with_a_timestamp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str], why: str
) -> None:
    monkeypatch.setenv("IMAGESTREAM_LOG_FORMAT", "json")
    monkeypatch.setattr("streaming.platform.topic.TIMEOUT_MS", 100)
    with redirect_stderr(io.StringIO()) as stream, pytest.raises(SystemExit) as ended:
        cli.run(["--home", str(tmp_path), *command])
    assert ended.value.code != 0
    *_, line = stream.getvalue().splitlines()
    found = json.loads(line)
    assert (found["level"], why in found["event"]) == ("error", True), found
    assert abs((datetime.now().astimezone() - datetime.fromisoformat(found["timestamp"])).total_seconds()) < 600


def test_each_line_is_one_json_object() -> None:
    target = io.StringIO()
    stream = JsonLines(target)
    for piece in ("pub", 'lished "a\x1b[31m"\n\n', "error: no", " broker\nrest"):
        stream.write(piece)
    found = [json.loads(line) for line in target.getvalue().splitlines()]
    expected = [("info", 'published "a\x1b[31m"'), ("error", "no broker")]
    assert [(one["level"], one["event"]) for one in found] == expected


def test_log_record_is_one_json_line_with_its_traceback() -> None:
    try:
        int("two\nlines")
    except ValueError:
        record = logging.makeLogRecord({"msg": "%s failed", "args": ("it",), "levelname": "ERROR"})
        record.exc_info = sys.exc_info()
    line = JsonFormatter().format(record)
    found = json.loads(line)
    assert "\n" not in line
    assert (found["level"], found["event"]) == ("error", "it failed")
    assert "ValueError: invalid literal" in found["exception"]
