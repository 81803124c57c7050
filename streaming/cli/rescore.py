"""`imagestream rescore`: score all messages again with another version, without the CNN."""

from dataclasses import asdict
from typing import Annotated

import typer

from streaming.cli.app import JsonOption, app, settings_of, write_json
from streaming.cli.command_line import MODELS
from streaming.cli.console import out, progress_bar, text_column
from streaming.cli.output import print_table
from streaming.wording import counted

AGREEMENT_COLUMNS = (
    "old_version rows agreement labelled judged old_accuracy new_accuracy only_old_right only_new_right "
    "fitted fitted_old_accuracy fitted_new_accuracy"
)
CHANGE_COLUMNS = "old_label new_label rows labelled old_right new_right"


@app.command(panel=MODELS)
def rescore(
    context: typer.Context,
    model: Annotated[int, typer.Option(min=1, metavar="N", help="Model version, as shown by 'models list'.")],
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="Skip predictions without stored features instead of failing.")
    ] = False,
    changes: Annotated[int, typer.Option(min=1, help="Number of the most frequent changes to show.")] = 10,
    workers: Annotated[int | None, typer.Option(min=1, help="Number of threads; default: one per core.")] = None,
    json_file: JsonOption = None,
) -> None:
    """Score all messages again with another version, from their stored features, and compare the predictions.

    Accuracies are compared on labelled images on which neither version was fitted (`judged`); images on which one of
    them may have been fitted are shown separately (`fitted`).

    The new predictions are written to the table `rescored`. An interrupted run can be repeated; it adds the missing
    rows.

    Example: imagestream rescore --model 2 --json rescored.json
    """
    from time import perf_counter

    from rich.progress import BarColumn, MofNCompleteColumn, TimeRemainingColumn

    from streaming.jobs.rescore import rescore as run
    from streaming.jobs.rescore import rows_to_read
    from streaming.jobs.rescore_compare import compare

    settings = settings_of(context)
    columns = (text_column("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    clock = perf_counter()
    with progress_bar(*columns) as progress:
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
        f"version {model}: {counted(done.rows, 'prediction')} added in {seconds:.1f} s "
        f"({done.rows / seconds:,.0f} rows/s), {done.there_before:,} already present"
        + (f", {counted(done.missing, 'prediction')} without stored features" if done.missing else "")
    )
    print_table("old and new predictions of the same messages", found.agreement, AGREEMENT_COLUMNS)
    print_table("most frequent changes", found.changes, CHANGE_COLUMNS)
    write_json(json_file, asdict(done) | {"seconds": seconds} | asdict(found))
