"""`imagestream report`: what the models answered, and whether the challenger would do better."""

from dataclasses import asdict
from typing import Annotated, Any

import typer

from streaming.cli.app import JsonOption, app, out, settings_of, write_json


@app.command()
def report(
    context: typer.Context,
    challenger: Annotated[int | None, typer.Option(min=1, help="Only this challenger's version.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="So many of the most frequent disagreements.")] = 10,
    json_file: JsonOption = None,
) -> None:
    """Show accuracy and confidence per model version, what was quarantined, and champion and challenger side by side.

    Accuracy counts images whose label is known: it came with the message, or was given since.

    Example: imagestream report --json report.json
    """
    from streaming.report import read_report

    found = read_report(settings_of(context), challenger=challenger, limit=limit)
    _table("predictions by model version", found.versions, "version rows labelled accuracy mean_confidence")
    _table("quarantine", found.quarantined, "reason rows replayed")
    _table(
        "champion and challenger on the same images",
        found.agreement,
        "challenger rows agreement labelled champion_accuracy challenger_accuracy only_champion_right "
        "only_challenger_right",
    )
    _table(
        "most frequent disagreements",
        found.disagreements,
        "champion_label challenger_label rows champion_right challenger_right",
    )
    if not found.agreement:
        out.print("no challenger has been scored beside the champion", highlight=False)
    write_json(json_file, asdict(found))


def _table(title: str, rows: list[dict[str, Any]], names: str) -> None:
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
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
