"""docs/query.md: its Python snippets run as written, on tables as written by the stream."""

import os
import re
import subprocess
import sys
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
def test_snippet_prints_rows(title: str, folder: Path, jars_dir: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("IMAGESTREAM_")}
    java = CHECKOUT / ".imagestream" / "java"
    if java.is_dir() and not (folder / ".imagestream" / "java").exists():
        (folder / ".imagestream" / "java").symlink_to(java)
    done = subprocess.run(
        [sys.executable, "-c", SNIPPETS[title]],
        cwd=folder,
        env=environment | {"IMAGESTREAM_JARS": str(jars_dir), "PYTHONPATH": str(CHECKOUT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"\b(cat|6)\b", done.stdout), done.stdout
