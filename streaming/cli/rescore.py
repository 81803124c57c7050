"""`imagestream rescore`: history scored again by another version, without the CNN."""

from dataclasses import asdict
from typing import Annotated

import typer

from streaming.cli.app import JsonOption, app, settings_of, write_json
from streaming.cli.command_line import MODELS
from streaming.cli.console import err, out, text_column
from streaming.cli.rows import print_table

AGREEMENT_COLUMNS = (
    "old_version rows agreement labelled judged old_accuracy new_accuracy only_old_right only_new_right "
    "fitted fitted_old_accuracy fitted_new_accuracy"
)
CHANGE_COLUMNS = "old_label new_label rows labelled old_right new_right"


@app.command(panel=MODELS)
def rescore(
    context: typer.Context,
    model: Annotated[int, typer.Option(min=1, metavar="N", help="The version, as 'models list' shows them.")],
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="Score what has stored features where some predictions have none.")
    ] = False,
    changes: Annotated[int, typer.Option(min=1, help="Show so many of the most frequent changes.")] = 10,
    workers: Annotated[int | None, typer.Option(min=1, help="Threads; default: one per core.")] = None,
    json_file: JsonOption = None,
) -> None:
    """Score all messages again by another version, from their stored features, and compare with the old answers.

    Accuracies are compared on labelled images that neither version was fitted on (`judged`); those of images that one
    of them was possibly fitted on are shown apart (`fitted`).

    The answers go into the table `rescored`, beside `predictions`. It can be interrupted and run again: what is there
    stays, what is missing is added.

    Example: imagestream rescore --model 2 --json rescored.json
    """
    from time import perf_counter

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    from streaming.jobs.rescore import rescore as run
    from streaming.jobs.rescore import rows_to_read
    from streaming.jobs.rescore_compare import compare

    settings = settings_of(context)
    columns = (text_column("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    clock = perf_counter()
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        total = rows_to_read(settings) if settings.place.has_table("features") else 0
        bar = progress.add_task("rows read", total=total)
        done = run(
            settings,
            model,
            allow_missing=allow_missing,
            workers=workers,
            on_rows=lambda rows: progress.advance(bar, rows),
        )
    seconds = perf_counter() - clock
    found = compare(settings, done.bundle_sha256, limit=changes)
    out.print(
        f"version {model}: {done.rows:,} answers added in {seconds:.1f} s ({done.rows / seconds:,.0f} rows/s), "
        f"{done.there_before:,} were there"
        + (f", {done.missing:,} predictions have no stored features" if done.missing else ""),
    )
    print_table("old and new answers to the same messages", found.agreement, AGREEMENT_COLUMNS)
    print_table("most frequent changes", found.changes, CHANGE_COLUMNS)
    write_json(json_file, asdict(done) | {"seconds": seconds} | asdict(found))
