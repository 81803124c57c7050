"""Shell integration: completion, output in pipes, exit codes and Ctrl-C."""

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from streaming.cli.app import EXIT_CODES, EXIT_INTERRUPTED, EXIT_UNCHECKED
from streaming.settings import Settings
from tests.conftest import command_here
from tests.streaming.history import commit_batch

BIN = Path(sys.executable).parent


def shell(line: str, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a line in bash, with `home` as the user's home directory and `imagestream` on the path."""
    path = f"{BIN}:{os.environ['PATH']}"
    return subprocess.run(
        ["/bin/bash", "-c", line],
        cwd=home,
        env={"HOME": str(home), "PATH": path, "SHELL": "/bin/bash"} | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.mark.parametrize(
    ("typed", "expected"),
    [("imagestream models ro", {"rollback"}), ("imagestream query --f", {"--format"})],
)
def test_bash_completes_commands_and_options(tmp_path: Path, typed: str, expected: set[str]) -> None:
    words = str(len(typed.split()) - 1)
    variables = {"_IMAGESTREAM_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": words}
    assert set(shell("imagestream", tmp_path, **variables).stdout.split()) == expected


def test_completion_is_installed_for_bash(tmp_path: Path) -> None:
    done = shell(
        "imagestream --install-completion; true", tmp_path
    )  # not the last command, so that bash stays the parent
    assert "bash completion installed" in done.stdout, done.stderr
    assert "imagestream.sh" in (tmp_path / ".bashrc").read_text(encoding="utf-8")
    (script,) = (tmp_path / ".bash_completions").iterdir()
    loaded = shell(f"source {script} && complete -p imagestream", tmp_path)
    assert loaded.stdout.startswith("complete -o default -F _imagestream_completion imagestream")


@pytest.mark.parametrize("command", ["models --help", "predictions"])  # written by Typer and by the console
def test_output_in_a_pipe_has_no_escape_sequences(tmp_path: Path, command: str) -> None:
    commit_batch(Settings(home=tmp_path / ".imagestream"), 0, {0: (0, 4)})
    done = shell(f"imagestream {command} | cat", tmp_path, TERM="xterm-256color")
    assert done.stdout.strip()
    assert not re.search(r"[\x1b\r]", done.stdout + done.stderr)


def test_help_lists_the_exit_codes() -> None:
    output = " ".join(command_here("--help")[1].split())
    assert all(f"{code} {meaning}" in output for code, meaning in EXIT_CODES.items()), output


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("models list", 0),
        ("models show 99", 1),
        ("broker status", 1),
        ("train", 2),
        ("nonsense", 2),
        ("predictions --limit many", 2),
    ],
)
def test_exit_codes_match_the_help(tmp_path: Path, line: str, code: int) -> None:
    assert command_here("--home", tmp_path, *line.split())[0] == code


def test_shell_receives_the_exit_code(tmp_path: Path) -> None:
    assert shell("imagestream audit", tmp_path).returncode == EXIT_UNCHECKED


def _query_seconds(process: psutil.Process) -> float:
    """CPU time of the process of the query, which the command starts."""
    with suppress(psutil.Error):
        times = [one.cpu_times() for one in process.children()]
        return sum(one.user + one.system for one in times)
    return 0.0


def test_ctrl_c_cancels_a_long_query(tmp_path: Path) -> None:
    commit_batch(Settings(home=tmp_path), 0, {0: (0, 4)})
    endless = "SELECT sum(sqrt(range)) FROM range(100000000000)"
    arguments = [sys.executable, "-m", "streaming", "--home", str(tmp_path), "query", endless]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        # The query is running: more CPU time than its imports take.
        while _query_seconds(psutil.Process(process.pid)) < 1.5:
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        output = process.communicate(timeout=300)
    assert (process.returncode, *output) == (EXIT_INTERRUPTED, "", "")
