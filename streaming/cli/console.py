"""Console output: results on standard output; progress, notes and warnings on standard error.

Text is printed verbatim. File names, class names and error messages may contain brackets and colons, so neither console
interprets markup or emoji codes; styles are passed separately from the text.
"""

import sys
from typing import IO, TYPE_CHECKING, Any, cast

from rich.console import Console
from rich.text import Text

from streaming.errors import UsageError

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn, TextColumn
    from rich.status import Status
    from rich.table import Table

WIDE = 10_000  # width in columns of output that is not on a terminal: it is never cut


def _console(*, stderr: bool) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    # A closed stream is None, as in a service.
    width = None if stream is not None and stream.isatty() else WIDE
    return Console(stderr=stderr, soft_wrap=True, emoji=False, markup=False, highlight=False, width=width)


out = _console(stderr=False)
err = _console(stderr=True)
_stdout_of: list[str] = []


def claim_stdout(data: str) -> None:
    """Reserve standard output for machine-readable data; messages go to standard error from now on.

    Raises:
        UsageError: other data is already written to standard output.
    """
    if _stdout_of and _stdout_of[0] != data:
        raise UsageError(f"{data} and {_stdout_of[0]} both go to standard output: give a file for one of them")
    _stdout_of[:] = [data]
    out.stderr = True


def release_stdout() -> None:
    """Undo `claim_stdout` and reset standard error to text, at the start of a command."""
    _stdout_of.clear()
    out.stderr = False
    err.file = cast("IO[str]", None)  # the current sys.stderr, whatever an earlier command set


def printable(text: str) -> str:
    """Replace control characters: names and data may contain terminal escape sequences."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def warn(*lines: str) -> None:
    """Print warnings on standard error."""
    for line in lines:
        err.print(printable(line), style="yellow")


class Spinner:
    """Shows the current step on a terminal; does nothing elsewhere."""

    def __init__(self, step: str) -> None:
        self._status: Status = err.status(Text(f"{step} …"))

    def __enter__(self) -> "Spinner":
        self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._status.stop()

    def update(self, step: str) -> None:
        # A str would be interpreted as markup.
        self._status.update(Text(f"{step} …"))


def text_column(template: str) -> "TextColumn":
    """Return a column of a progress bar that shows its text verbatim."""
    from rich.progress import TextColumn

    return TextColumn(template, markup=False)


def progress_bar(*columns: "ProgressColumn") -> "Progress":
    """Return a progress bar on standard error, which is shown on a terminal only and removed at its end."""
    from rich.progress import Progress

    return Progress(*columns, console=err, transient=True, disable=not err.is_terminal)


def new_table(*names: str, title: str | None = None, lined: bool = False, head: bool = True) -> "Table":
    """Return an empty table whose cells are shown verbatim; `lined` draws a line below the column names."""
    from rich import box
    from rich.table import Table

    return Table(
        *names,
        title=title,
        title_justify="left",
        box=box.SIMPLE_HEAD if lined else None,
        show_header=head,
        pad_edge=False,
    )


def draw(table: "Table", stream: IO[str]) -> None:
    """Write a table at its natural width instead of squeezing it into the terminal's."""
    Console(file=stream, width=WIDE, markup=False, emoji=False, highlight=False).print(table)


def styled(value: Any, style: str = "") -> Text:
    """Return a table cell with control characters replaced."""
    return Text(printable(str(value)), style)
