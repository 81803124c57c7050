"""Mutation testing: the generated mutants, and target entries and reasons that match the current code."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.mutants.__main__ import read_reasons
from tests.mutants.edits import mutants
from tests.mutants.targets import TARGETS

CHECKOUT = Path(__file__).parent.parent


def edits(text: str) -> set[str]:
    return {one.after for one in mutants(text)}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a < b", {"a <= b", "a >= b"}),
        ("a is not b", {"a is b"}),
        ("a not in b", {"a in b"}),
        ("a and b or c", {"a or b or c", "a and b and c"}),
        ("not a", {"(a)"}),
        ("x = 20 * 1024**2", {"x = (20 * 1024**2 + 1)", "x = (20 * 1024**2 - 1)"}),
        ("x = a + 1", {"x = a - 1", "x = a + 2", "x = a + 0"}),
        ("x = True", {"x = False"}),
        ("x = 'text'", set()),
        ("x: int = 1", {"x: int = 2", "x: int = 0"}),
        ("f(a, b, c)", {"pass", "f(b, a, c)"}),
        ("x = min(a, b)", {"x = max(a, b)"}),
        ("x = sorted(a)", {"x = (a)"}),
        ("x = a if b else c", {"x = a if (not (b)) else c"}),
        ("x = f'{a + 1} of {b}'", set()),
        ("raise Error(f'{a}')", {"pass"}),
        ("def f():\n    return a", {"return None"}),
        ("def f():\n    '''Says a < b.'''", set()),
        ("x = 'SELECT a FROM t WHERE a < 1 AND b'", {
            "x = 'SELECT a FROM t WHERE a <= 1 AND b'",
            "x = 'SELECT a FROM t WHERE a < 1 OR b'",
        }),
        ("ä = 'ö' < b", {"ä = 'ö' <= b", "ä = 'ö' >= b"}),
    ],
)  # fmt: skip
def test_each_mutant_is_one_edit_of_the_text(text: str, expected: set[str]) -> None:
    assert edits(text) == expected


def test_mutant_has_its_line_and_enclosing_function() -> None:
    text = "a = 1\n\n@cache\ndef f():\n    return (\n        b + c\n    )\n"
    found = {one.after: (one.line, one.scope) for one in mutants(text)}
    assert found["a = 2"] == (1, None)
    assert found["b - c"] == (6, (3, 7))
    assert found["return None"] == (5, (3, 7))


def test_excluded_functions_are_not_mutated() -> None:
    text = "class A:\n    def f(self):\n        return a < b\n    def g(self):\n        return 1\n"
    assert {one.line for one in mutants(text, frozenset({"A.f"}))} == {5}


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.path)
def test_entries_of_a_target_match_the_code(target) -> None:
    """Excluded functions, test files and reasons for survivors exist in the current code."""
    text = (CHECKOUT / target.path).read_text()
    for file in target.tests:
        assert (CHECKOUT / file).is_file()
    for name in target.excluded:
        assert f"def {name.rpartition('.')[2]}(" in text
    generated = {(target.path, one.before, one.after) for one in mutants(text, target.excluded)}
    assert {key for key in read_reasons() if key[0] == target.path} <= generated


def test_sample_of_mutants_is_run_and_counted() -> None:
    command = [sys.executable, "-m", "tests.mutants", "--module", "producer/message", "--sample", "2", "--seed", "1"]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "killed: 100.0%" in done.stdout
