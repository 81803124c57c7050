"""Rows as tables on the terminal, the same for every command that shows some."""

from collections.abc import Mapping, Sequence
from typing import Any

from streaming.cli.app import out


def print_table(title: str, rows: Sequence[Mapping[str, Any]], names: str) -> None:
    """Print the columns `names` (separated by spaces) of some rows; nothing where there are none."""
    from rich.table import Table
    from rich.text import Text

    if not rows:
        return
    columns = names.split()
    table = Table(*(column.replace("_", " ") for column in columns), title=title, title_justify="left", box=None)
    for row in rows:
        table.add_row(*(Text(_cell(row[column])) for column in columns))
    out.print(table)
    out.print()


def _cell(value: Any) -> str:
    match value:
        case None:
            return "-"
        case float():
            return f"{value:.4f}"
        case int():
            return f"{value:,}"
    return str(value)
