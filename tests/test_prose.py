"""`.ci/prose`: archaic phrases are found in prose and nowhere else."""

import subprocess
import sys
from pathlib import Path

import pytest

CHECK = Path(__file__).parent.parent / ".ci" / "prose"


@pytest.mark.parametrize(
    ("name", "text", "lines"),
    [
        ("page.md", "It tells\nof a file.\n\n`tells of`\n\n```text\nwhom\n```\n", [1]),
        ("page.md", "It describes a file.\n", []),
        ("compose.yml", "a: whoever # started anew,\n# and once\n# more\n", [1, 2]),
        ("code.py", '"""Made\nagain."""\nsaid = "whoever"  # it\n# told\nx = 1  # is no\n# image made anew\n', [5, 6]),
        ("code.py", 'def f(help):\n    """A file."""\n\n\nf(\n    help="What it tells "\n    f"of {1}."\n)\n', [6]),
        ("code.py", "said = whom('anew')\n", []),
        ("test_code.py", "def test_what_is_told(): ...  # anew\n\n\ndef is_told(): ...\n", [1, 1]),
    ],
)
def test_phrases_are_reported_in_prose_only(tmp_path: Path, name: str, text: str, lines: list[int]) -> None:
    page = tmp_path / name
    page.write_text(text, encoding="utf-8")
    done = subprocess.run([sys.executable, CHECK, page], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert [int(line.removeprefix(f"{page}:").partition(":")[0]) for line in done.stdout.splitlines()] == lines
    assert done.returncode == bool(lines)
    assert done.stdout.count(": write ") == len(lines)
