"""`imagestream query` on a terminal: an interactive shell with history, completion and multi-line statements."""

import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.filters import Condition
from prompt_toolkit.history import FileHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from streaming.cli.console import err, out
from streaming.cli.output_formats import Format, write_rows
from streaming.errors import ConfigurationError, ServiceError

if TYPE_CHECKING:
    import pyarrow as pa

RunQuery = Callable[[str], AbstractContextManager["pa.RecordBatchReader"]]

PROMPT, CONTINUED = "imagestream> ", "        ...> "
COMMANDS = {
    "\\d": "list the tables; `\\d NAME` lists the columns of one",
    "\\timing": "switch the display of query times on or off",
    "\\?": "show this help",
    "\\q": "quit, like Ctrl-D",
}
KEYWORDS = (
    "SELECT FROM WHERE GROUP BY ORDER HAVING LIMIT DISTINCT AS AND OR NOT IN IS NULL LIKE BETWEEN CASE WHEN THEN ELSE"
    " END JOIN LEFT USING ON UNION ALL WITH DESC ASC DESCRIBE SHOW TABLES COUNT SUM AVG MIN MAX ROUND DATE INTERVAL"
)
COLUMNS_SQL = "SELECT table_name, column_name FROM information_schema.columns ORDER BY table_name, ordinal_position"


def run_shell(ask: RunQuery, tables: Mapping[str, Sequence[str]], history: Path) -> None:
    """Read and run statements until Ctrl-D or `\\q`; a statement that fails is reported on one line.

    `tables` are the column names of every table, for completion.
    """
    _keep_private(history)
    session: PromptSession[str] = PromptSession(
        PROMPT,
        history=FileHistory(str(history)),
        completer=SqlCompleter(tables),
        complete_while_typing=False,
        multiline=True,
        prompt_continuation=CONTINUED,
        key_bindings=_bindings(),
    )
    out.print(f"tables: {', '.join(tables)}; end a statement with ;  \\? for help, Ctrl-D to quit")
    shell = Shell(ask)
    with suppress(EOFError):
        while True:
            try:
                shell.run(session.prompt())
            except KeyboardInterrupt:  # clears the line or cancels the query
                continue
            except ServiceError as error:
                err.print(f"error: {error}")


class Shell:
    """Runs statements, and commands that begin with a backslash."""

    def __init__(self, ask: RunQuery) -> None:
        self._ask = ask
        self._timing = False

    def run(self, text: str) -> None:
        """Run one statement, with or without its semicolon, or one command.

        Raises:
            ServiceError: the statement is rejected or fails, or the command is unknown.
            EOFError: the command is `\\q`.
        """
        text = text.strip().rstrip(";").strip()
        if not text.startswith("\\"):
            self._show(text)
            return
        command, _, argument = text.partition(" ")
        match command:
            case "\\d":
                self._show(f'DESCRIBE "{argument.strip().replace(chr(34), "")}"' if argument else "SHOW TABLES")
            case "\\timing":
                self._timing = not self._timing
                out.print(f"timing is {'on' if self._timing else 'off'}")
            case "\\?":
                for name, meaning in COMMANDS.items():
                    out.print(f"{name:8} {meaning}")
            case "\\q":
                raise EOFError
            case _:
                raise ConfigurationError(f"unknown command {command}: expected one of {' '.join(COMMANDS)}")

    def _show(self, sql: str) -> None:
        if not sql:
            return
        clock = perf_counter()
        with self._ask(sql) as reader:
            write_rows(reader, Format.TABLE, None)
        sys.stdout.flush()
        if self._timing:
            out.print(f"{perf_counter() - clock:.3f} s")


class SqlCompleter(Completer):
    """Completes tables, columns, keywords and commands; keywords in the case that is typed."""

    def __init__(self, tables: Mapping[str, Sequence[str]]) -> None:
        self._tables = tables

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:  # noqa: ARG002
        before = document.text_before_cursor
        typed = re.split(r"[^\w\\?]", before)[-1]
        for word in dict.fromkeys(self._completions(before, typed, document.text)):
            if word.lower().startswith(typed.lower()) and word != typed:
                yield Completion(word, start_position=-len(typed))

    def _completions(self, before: str, typed: str, statement: str) -> Iterator[str]:
        if before.lstrip().startswith("\\"):
            yield from self._tables if " " in before else COMMANDS
            return
        named = [name for name in self._tables if re.search(rf"\b{re.escape(name)}\b", statement)]
        if re.search(r"\b(from|join|describe)\s+\w*$", before, re.IGNORECASE):
            yield from self._tables
            return
        # Only the columns of the tables that the statement names, if it names any.
        for name in named or self._tables:
            yield from self._tables[name]
        yield from self._tables
        lower = typed.islower()
        yield from (word.lower() if lower else word for word in KEYWORDS.split())


def columns_of(ask: RunQuery) -> dict[str, list[str]]:
    """Return the column names of every table.

    Raises:
        ServiceError: the home has no tables.
    """
    tables: dict[str, list[str]] = {}
    with ask(COLUMNS_SQL) as reader:
        for batch in reader:
            for table, column in zip(*(values.to_pylist() for values in batch.columns), strict=True):
                tables.setdefault(table, []).append(column)
    return tables


def _bindings() -> KeyBindings:
    bindings = KeyBindings()

    @Condition
    def complete() -> bool:
        from prompt_toolkit.application import get_app

        text = get_app().current_buffer.text.strip()
        return not text or text.endswith(";") or text.startswith("\\")

    @bindings.add("enter", filter=complete)
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    return bindings


def _keep_private(history: Path) -> None:
    """Restrict the history to its owner: queries may contain personal data."""
    try:
        os.close(os.open(history, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600))
        history.chmod(0o600)
    except OSError as error:
        raise ConfigurationError(f"the history {history} cannot be written: {error.strerror}") from error
