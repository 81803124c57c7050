"""What commands print: results on standard output, everything about the work on standard error.

Text is shown as it is. File names, class names and error messages may hold brackets and colons, so neither console
reads markup or emoji codes: style is given beside the text, never in it.
"""

import sys
from typing import IO, TYPE_CHECKING, Any, cast

from rich.console import Console
from rich.text import Text

from streaming.errors import UsageError

if TYPE_CHECKING:
    from rich.progress import TextColumn
    from rich.status import Status
    from rich.table import Table

WIDE = 10_000  # columns of output that is not on a terminal: it is never cut


def _console(*, stderr: bool) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    # A closed stream is None, as for a service.
    width = None if stream is not None and stream.isatty() else WIDE
    return Console(stderr=stderr, soft_wrap=True, emoji=False, markup=False, highlight=False, width=width)


out = _console(stderr=False)
err = _console(stderr=True)
_stdout_of: list[str] = []


def claim_stdout(data: str) -> None:
    """Standard output is for these data alone, which a program reads: what people read goes to standard error.

    Raises:
        UsageError: other data go there already.
    """
    if _stdout_of and _stdout_of[0] != data:
        raise UsageError(f"{data} and {_stdout_of[0]} both go to standard output: give a file for one of them")
    _stdout_of[:] = [data]
    out.stderr = True


def release_stdout() -> None:
    """Standard output is for people again, and standard error for text: as a command begins."""
    _stdout_of.clear()
    out.stderr = False
    err.file = cast("IO[str]", None)  # standard error as it is now, whatever an earlier command set


def printable(text: str) -> str:
    """The text with control characters replaced: names and data may hold a terminal's commands."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def warn(*lines: str) -> None:
    """Lines on standard error about something that the user should know, and that does not stop the command."""
    for line in lines:
        err.print(printable(line), style="yellow")


class Spinner:
    """What is being done at the moment, on a terminal; nothing elsewhere."""

    def __init__(self, step: str) -> None:
        self._status: Status = err.status(Text(f"{step} …"))

    def __enter__(self) -> "Spinner":
        self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._status.stop()

    def update(self, step: str) -> None:
        # A str would be read as markup.
        self._status.update(Text(f"{step} …"))


def text_column(template: str) -> "TextColumn":
    """A column of a progress bar that shows its text as it is."""
    from rich.progress import TextColumn

    return TextColumn(template, markup=False)


def new_table(*names: str, title: str | None = None, lined: bool = False, head: bool = True) -> "Table":
    """A table whose cells are shown as they are.

    Args:
        lined: with a line below the names of the columns.
        head: whether the names are shown.
    """
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
    """Write a table as wide as its cells: one squeezed into the terminal loses what it should show."""
    Console(file=stream, width=WIDE, markup=False, emoji=False, highlight=False).print(table)


def styled(value: Any, style: str = "") -> Text:
    """A cell of a table."""
    return Text(printable(str(value)), style)
