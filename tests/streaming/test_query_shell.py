"""`imagestream query`: the shell on a terminal, SQL from a pipe, and `--watch`."""

import io
import os
import pty
import select
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document

from streaming.cli.query_shell import SqlCompleter
from streaming.settings import Settings
from tests.conftest import command_here
from tests.faults.harness import wait_until
from tests.streaming.history import commit_batch

TABLES = {"labels": ["image_id", "label", "by"], "predictions": ["image_id", "label", "confidence"]}
PATIENCE_S = 300
RED = "\x1b[31m"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    settings = Settings(home=tmp_path / "home")
    commit_batch(settings, 0, {0: (0, 4)}, bad={3})
    return settings


def command(settings: Settings, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "streaming", "--home", str(settings.home), *arguments]


class Terminal:
    """A process on a pseudo-terminal, with its input and output."""

    def __init__(self, process: subprocess.Popen[bytes], terminal: int) -> None:
        self.process = process
        self._terminal = terminal
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self._terminal, text.encode())

    def until(self, text: str) -> str:
        """Wait for `text`, and return and consume the output up to it."""
        end = time.monotonic() + PATIENCE_S
        while text not in self.seen:
            assert time.monotonic() < end, f"no {text!r} in {self.seen!r}"
            if select.select([self._terminal], [], [], 0.2)[0]:
                try:
                    self.seen += os.read(self._terminal, 65536).decode(errors="replace")
                except OSError:  # reported by Linux after the other side has closed
                    assert text in self.seen, f"exited without {text!r}: {self.seen!r}"
        before, _, self.seen = self.seen.partition(text)
        return before


def wait_for_cpu_time(pid: int, seconds: float) -> None:
    """Wait until the process and its children have used this much more CPU time, however busy the machine is."""
    process = psutil.Process(pid)

    def used() -> float:
        with suppress(psutil.NoSuchProcess):
            return sum(one.cpu_times().user for one in [process, *process.children()])
        return 0.0

    target = used() + seconds
    wait_until(lambda: used() >= target, lambda: "the process uses no CPU time")


@contextmanager
def on_terminal(arguments: list[str], **environment: str) -> Iterator[Terminal]:
    controller, terminal = pty.openpty()
    inherited = {name: value for name, value in os.environ.items() if name not in {"NO_COLOR", "FORCE_COLOR"}}
    process = subprocess.Popen(
        arguments,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        env=inherited | {"TERM": "xterm", "COLUMNS": "120", "LINES": "40", "PROMPT_TOOLKIT_NO_CPR": "1"} | environment,
        start_new_session=True,
    )
    os.close(terminal)
    try:
        yield Terminal(process, controller)
        process.wait(PATIENCE_S)
    finally:
        process.kill()
        process.wait()
        os.close(controller)


def test_shell_continues_after_errors_and_keeps_its_history_private(settings: Settings) -> None:
    with on_terminal(command(settings, "query")) as shell:
        assert "batches, features" not in shell.until("imagestream>")
        shell.type("SELECT count(*)\r")  # no semicolon yet: the statement continues
        shell.until("...>")
        shell.type("AS predicted FROM predictions;\r")
        shell.until("1 row")
        shell.until("imagestream>")
        shell.type("SELECT nothing FROM predictions;\r")
        shell.until('error: SQL: Binder Error: Referenced column "nothing" not found')
        shell.type("SELECT 1 FROM oops")
        shell.type("\x03")  # Ctrl-C clears the input
        shell.type("\\timing\r")
        shell.until("timing is on")
        shell.type("\\d quarantine\r")
        shell.until("value_sha256")
        shell.until(" s\r\n")
        shell.type("\\nonsense\r")
        shell.until("error: unknown command \\nonsense: expected one of \\d \\timing \\? \\q")
        shell.until("imagestream>")  # the end of input is read only at a prompt
        shell.type("\x04")
    assert shell.process.returncode == 0
    history = settings.work_dir / "query_history"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    assert "AS predicted FROM predictions;" in history.read_text(encoding="utf-8")
    assert "oops" not in history.read_text(encoding="utf-8")


def test_ctrl_c_and_the_time_limit_cancel_a_query(settings: Settings) -> None:
    endless = "SELECT sum(sqrt(range)) FROM range(100000000000);\r"
    with on_terminal(command(settings, "query", "--timeout", "300")) as shell:
        shell.until("imagestream>")
        shell.type(endless)
        wait_for_cpu_time(shell.process.pid, 0.5)  # the query is running
        shell.process.send_signal(signal.SIGINT)
        shell.type("SELECT 6 * 7 AS answer;\r")
        assert "longer than" not in shell.until(" 42 ")
        shell.type("\\q\r")
    with on_terminal(command(settings, "query", "--timeout", "0.01")) as shell:
        shell.until("imagestream>")  # the limit does not apply to the start
        shell.type(endless)
        shell.until("error: SQL: the query took longer than 0.01 s")
        shell.type("\\q\r")
    assert shell.process.returncode == 0


def test_shell_does_not_start_without_tables_and_shows_errors_in_red(tmp_path: Path) -> None:
    with on_terminal(command(Settings(home=tmp_path / "empty"), "query")) as shell:
        assert RED in shell.until("no tables yet")
    assert shell.process.returncode == 1
    assert not (tmp_path / "empty").exists()


@pytest.mark.parametrize(
    ("text", "expected", "unexpected"),
    [
        ("", {"SELECT", "predictions", "confidence"}, {"\\d"}),
        ("sel", {"select"}, {"SELECT"}),
        ("SELECT * FROM p", {"predictions"}, {"labels"}),
        ("SELECT * FROM ", {"predictions", "labels"}, {"confidence", "SELECT"}),
        ("FROM labels SELECT ", {"by"}, {"confidence"}),
        ("SELECT predictions.con", {"confidence"}, {"predictions"}),
        ("\\", {"\\d", "\\q", "\\timing"}, {"SELECT"}),
        ("\\d l", {"labels"}, {"label"}),
    ],
)
def test_completion_suggests_valid_continuations(text: str, expected: set[str], unexpected: set[str]) -> None:
    document = Document(text)
    offered = {found.text for found in SqlCompleter(TABLES).get_completions(document, CompleteEvent())}
    assert expected <= offered
    assert not unexpected & offered


@pytest.mark.parametrize(
    ("sql", "expected"),
    [
        ("SELECT count(*) AS n\nFROM predictions;\n", (0, "n\n3\n", "")),
        ("", (2, "", "error: no SQL: expected a SELECT statement as argument or on standard input\n")),
    ],
)
def test_sql_is_read_from_standard_input(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, sql: str, expected: tuple[int, str, str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(sql))
    assert command_here("--home", settings.home, "query", "--format", "csv") == expected


def test_watch_prints_each_change_once_until_interrupted(settings: Settings) -> None:
    sql = "SELECT count(*) AS n FROM predictions"
    arguments = command(settings, "query", sql, "--format", "csv", "--watch", "--every", "200ms")
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stderr
        assert [process.stdout.readline() for _ in range(2)] == ["n\n", "3\n"]
        wait_for_cpu_time(process.pid, 0.2)  # several unchanged results
        commit_batch(settings, 1, {0: (4, 8)})
        assert [process.stdout.readline() for _ in range(2)] == ["n\n", "7\n"]
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read(), process.stderr.read()
        assert (process.wait(PATIENCE_S), *rest) == (0, "", "")


def test_watch_redraws_a_terminal_in_place(settings: Settings) -> None:
    arguments = command(settings, "query", "SELECT count(*) AS n FROM predictions", "--watch", "--every", "200ms")
    with on_terminal(arguments) as terminal:
        terminal.until("3")
        terminal.until("Ctrl-C to stop")
        commit_batch(settings, 1, {0: (4, 8)})
        assert "\x1b[" in terminal.until("7")  # moved back up
        terminal.process.send_signal(signal.SIGINT)
    assert terminal.process.returncode == 0


def test_watch_into_a_file_is_refused(settings: Settings) -> None:
    assert command_here("--home", settings.home, "query", "SELECT 1", "--watch", "--output", "rows.csv") == (
        2, "", "error: --watch shows rows as they change: expected no --output FILE\n",
    )  # fmt: skip


def test_no_color_is_respected(tmp_path: Path) -> None:
    arguments = command(Settings(home=tmp_path / "empty"), "models", "show", "99")
    with on_terminal(arguments, NO_COLOR="1") as terminal:
        assert RED not in terminal.until("there is no model version 99")
