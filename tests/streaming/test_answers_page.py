"""The example programs of docs/answers.md read the answers of a real stream."""

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest

from streaming.pipeline.answer_message import answer_message
from streaming.settings import Settings
from streaming.storage.tables import PREDICTIONS
from tests.conftest import CHECKOUT, environment
from tests.streaming.answered import ROWS, begun, commit
from tests.streaming.history import NOON, prediction

PAGE = CHECKOUT / "docs" / "answers.md"
BLOCKS = re.findall(r"^( *)```python\n(.*?)^\1```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
CONSUMER, AVRO, FOLLOW = (re.sub(rf"^{indent}", "", code, flags=re.MULTILINE) for indent, code in BLOCKS)


def test_consumer_example_prints_each_answer(tmp_path: Path, broker: Settings) -> None:
    settings = begun(Settings(home=tmp_path), broker, answers="predictions")
    commit(settings, 1, 2)
    assert len(CONSUMER.splitlines()) <= 15
    code = CONSUMER
    for text, here in (
        ('"predictions"', repr(settings.answers_topic)),
        ("localhost:9092", str(settings.bootstrap_servers)),
        ("sorting-machine", uuid4().hex),
    ):
        assert text in code
        code = code.replace(text, here)
    with subprocess.Popen([sys.executable, "-uc", code], stdout=subprocess.PIPE, text=True) as consumer:
        assert consumer.stdout is not None
        try:
            lines = [consumer.stdout.readline() for _ in range(4 * ROWS - 2)]
        finally:
            consumer.terminate()
    assert lines == ["None None cat 0.75\n"] * len(lines)


def test_avro_record_is_read_with_the_published_schema(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PAGE.parent)
    row = dict.fromkeys(PREDICTIONS.names) | prediction(Settings(), 0, 7)
    names: dict[str, Any] = {"message": SimpleNamespace(value=answer_message("predictions", row, "avro").value)}
    exec(AVRO, names)  # noqa: S102
    assert (names["answer"]["label"], names["answer"]["offset"], names["answer"]["scored_at"]) == ("cat", 7, NOON)


def test_follow_example_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = begun(Settings(home=tmp_path), None)
    commit(settings, 1, 1)
    names: dict[str, Any] = {}
    with environment(IMAGESTREAM_HOME=str(tmp_path)):
        exec(FOLLOW, names)  # noqa: S102
    assert capsys.readouterr().out in {f"{partition}-0 cat\n" for partition in (0, 1)}
    assert re.fullmatch(r"table/\d+/1", names["last"])
