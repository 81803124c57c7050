"""Options and helpers of the commands that list rows."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from streaming.cli.command_line import seconds
from streaming.cli.console import new_table, out, printable, styled
from streaming.cli.output_formats import Format, Rows, write_rows

FormatOption = Annotated[Format, typer.Option("--format", help="Format of the rows; parquet needs --output.")]
OutputOption = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="FILE", help="File to write the rows to; - for standard output."),
]
WATCH_S = 2.0
EveryOption = Annotated[
    Any,
    typer.Option("--every", parser=seconds, metavar="TIME", help="Interval between updates with --watch, e.g. 10s."),
]


def list_rows(
    rows: Sequence[Mapping[str, Any]], columns: Mapping[str, type], format_: Format, output: Path | None
) -> None:
    """Write the rows of a listing.

    Args:
        columns: the type of each column, as for `Rows.of_mappings`.
        output: the file; None or `-` for standard output.
    """
    write_rows(Rows.of_mappings(rows, columns), format_, output)


def print_table(title: str, rows: Sequence[Mapping[str, Any]], names: str) -> None:
    """Print a table of rows for people; nothing if there are none.

    Args:
        title: title above the table; may be empty.
        names: names of the columns to print, separated by spaces.
    """
    if not rows:
        return
    columns = names.split()
    table = new_table(*(column.replace("_", " ") for column in columns), title=title or None)
    for row in rows:
        table.add_row(*(styled(_cell(row[column])) for column in columns))
    out.print(table)
    out.print()


def print_details(details: Sequence[tuple[str, str]]) -> None:
    """Print name-value pairs, one per line."""
    table = new_table("", "", head=False)
    for name, value in details:
        table.add_row(styled(name), styled(value))
    out.print(table)


def _cell(value: Any) -> str:
    match value:
        case None:
            return "-"
        case float():
            return f"{value:.4f}"
        case int():
            return f"{value:,}"
    return printable(str(value))
