"""The Makefile's targets in a copy of the checkout: set-up, demo, clean and distclean."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parent.parent
SOURCES = ("requirements.lock", "pyproject.toml", "streaming/platform/ivy.xml", "streaming/platform/jars.lock")
FOR_TESTS = (".imagestream/tests/.backbones", ".imagestream/tests/.classes")
STAMPS = (".venv/.locked", ".venv/.ready", ".imagestream/jars/.ready", *FOR_TESTS)
UP_TO_DATE, STALE = 0, 1  # how `make --question` exits

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The files of a checkout that make reads, without a virtual environment."""
    for name in ("Makefile", "tests/prepare.py", *SOURCES):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(CHECKOUT / name, tmp_path / name)
    return tmp_path


def make(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["make", "--no-print-directory", *arguments]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False, timeout=300)


def set_up(directory: Path) -> None:
    for stamp in STAMPS:
        (directory / stamp).parent.mkdir(parents=True, exist_ok=True)
        (directory / stamp).touch()


def test_make_without_a_target_lists_all_targets(checkout: Path) -> None:
    listed = make(checkout).stdout
    assert all(
        f"make {target} " in listed for target in ("setup", "demo", "test", "check", "bench", "examples", "clean")
    )


@pytest.mark.parametrize("target", ["setup", ".venv/.ready", *FOR_TESTS])
def test_completed_set_up_is_not_repeated(checkout: Path, target: str) -> None:
    assert make(checkout, "--question", target).returncode == STALE
    set_up(checkout)
    assert make(checkout, "--question", target).returncode == UP_TO_DATE


@pytest.mark.parametrize("source", SOURCES)
def test_changed_dependencies_require_set_up_again(checkout: Path, source: str) -> None:
    set_up(checkout)
    later = time.time() + 10
    os.utime(checkout / source, (later, later))
    assert make(checkout, "--question", "setup").returncode == STALE


@pytest.mark.parametrize("given", [["IMAGESTREAM_HOME={}", "ARGS=--yes"], ["ARGS=--home {} --yes"]])
def test_demo_accepts_a_home_on_the_command_line_of_make(
    checkout: Path, given: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("JARS", "BACKBONES"):
        monkeypatch.delenv(f"IMAGESTREAM_{name}", raising=False)
    set_up(checkout)
    program = checkout / ".venv" / "bin" / "imagestream"
    program.parent.mkdir(exist_ok=True)
    program.write_text('#!/bin/sh\necho "$IMAGESTREAM_HOME $IMAGESTREAM_JARS $IMAGESTREAM_BACKBONES $*"\n')
    program.chmod(0o755)
    done = make(checkout, "demo", *(word.format("s3://imagestream/home") for word in given))
    here = checkout / ".imagestream"
    assert done.stdout.split() == ["s3://imagestream/home", f"{here}/jars", f"{here}/backbones", "demo", "--yes"]


@pytest.mark.parametrize("home", [["tables", "models", "jars"], ["models"], ["demo", "broker"]])
@pytest.mark.parametrize("target", ["clean", "distclean"])
def test_clean_and_distclean_keep_user_data(checkout: Path, target: str, home: list[str]) -> None:
    for name in home:
        (checkout / ".imagestream" / name).mkdir(parents=True)
        (checkout / ".imagestream" / name / "file").touch()
    done = make(checkout, target)
    assert done.returncode == 0, done.stderr
    kept = [name for name in home if name != "jars"]
    assert all((checkout / ".imagestream" / name / "file").is_file() for name in kept)
    assert (checkout / ".imagestream" / "jars").exists() == (target == "clean" and "jars" in home)
    assert ("to remove your data: rm -r .imagestream" in done.stdout) == (target == "distclean")


def test_clean_removes_only_caches(checkout: Path) -> None:
    set_up(checkout)
    (checkout / ".pytest_cache").mkdir()
    assert make(checkout, "clean").returncode == 0
    assert not (checkout / ".pytest_cache").exists()
    assert make(checkout, "--question", "setup").returncode == UP_TO_DATE


def test_distclean_removes_what_set_up_installed(checkout: Path) -> None:
    set_up(checkout)
    assert make(checkout, "distclean").returncode == 0
    assert not (checkout / ".venv").exists()
    assert not (checkout / ".imagestream").exists()


def test_unsupported_or_missing_python_is_a_one_line_error(checkout: Path) -> None:
    missing = make(checkout, "setup", "PYTHON=")
    assert missing.returncode != 0
    assert "Python 3.11, 3.12 or 3.13 is needed, none was found" in missing.stderr.splitlines()[0]
    unsupported = make(checkout, "setup", "PYTHON=python3.9-absent")
    assert "is needed, not python3.9-absent" in unsupported.stderr.splitlines()[0]


def test_set_up_uses_the_selected_python_and_the_lock(checkout: Path) -> None:
    planned = make(checkout, "--dry-run", ".venv/.locked", f"PYTHON={sys.executable}").stdout
    assert f"{sys.executable} -m venv .venv" in planned
    assert "--require-hashes -r requirements.lock" in planned
