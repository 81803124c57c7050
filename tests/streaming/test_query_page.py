"""docs/query.md: its Python snippets run as written, on tables as written by the stream."""

import os
import re
from pathlib import Path

import pytest

from streaming.settings import Settings
from tests.streaming.history import commit_batch

CHECKOUT = Path(__file__).parents[2]
PAGE = (CHECKOUT / "docs" / "query.md").read_text(encoding="utf-8")
SNIPPETS = dict(re.findall(r"^## ([^\n]+)\n(?:(?!^## ).)*?```python\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with a home."""
    folder = tmp_path_factory.mktemp("page")
    settings = Settings(home=folder / ".imagestream")
    for batch in range(2):
        commit_batch(settings, batch, {0: (4 * batch, 4 * batch + 4)}, bad={4 * batch + 3})
    return folder


def test_every_snippet_is_found() -> None:
    assert len(SNIPPETS) == PAGE.count("```python") >= 5


@pytest.mark.parametrize("title", SNIPPETS)
def test_snippet_prints_rows(
    title: str,
    folder: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    snippet = SNIPPETS[title]
    if title == "Spark":  # uses the session of this process, whose JVM has another working directory
        request.getfixturevalue("spark")
        snippet = snippet.replace('".imagestream/', f'"{folder}/.imagestream/')
    for name in [name for name in os.environ if name.startswith("IMAGESTREAM_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(folder)
    exec(compile(snippet, title, "exec"), {"__name__": "__main__"})  # noqa: S102
    assert re.search(r"\b(cat|6)\b", capsys.readouterr().out)
