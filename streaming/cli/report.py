"""`imagestream report`: what the models answered and what they are worth, as tables or as a page."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from streaming.cli.app import JsonOption, app, err, out, settings_of, write_json
from streaming.cli.rows import print_table
from streaming.errors import ServiceError

if TYPE_CHECKING:
    from streaming.reports.report_content import ModelReport


@app.command()
def report(
    context: typer.Context,
    challenger: Annotated[int | None, typer.Option(min=1, help="Only this challenger's version.")] = None,
    limit: Annotated[
        int, typer.Option(min=1, help="So many of the most frequent disagreements, and of the newest micro-batches.")
    ] = 10,
    model: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Evaluate this version on its holdout, as an HTML page.")
    ] = None,
    against: Annotated[
        int | None, typer.Option(min=1, metavar="M", help="With --model: beside this version, on the same images.")
    ] = None,
    live: Annotated[
        bool, typer.Option("--live", help="Evaluate the stored predictions whose label is known, as an HTML page.")
    ] = False,
    output: Annotated[
        Path, typer.Option(metavar="FILE", help="The page of --model or --live; its figures go to a folder beside it.")
    ] = Path("report.html"),
    json_file: JsonOption = None,
) -> None:
    """Show accuracy and confidence per model version, what was quarantined, and champion and challenger side by side.

    Accuracy counts images whose label is known: it came with the message, or was given since. With --model, or --live,
    write one HTML file instead that needs no other: figures with confidence intervals, plots, samples, mistakes.

    Example: imagestream report, or: imagestream report --model 2 --against 1 --output report.html
    """
    if model is not None or live:
        _check_output(output)
        return _write_page(_read_page(context, model, against, live), output, json_file)
    if against is not None:
        raise ServiceError("--against M compares with a version: name the other with --model N")

    from streaming.reports.report import read_report

    found = read_report(settings_of(context), challenger=challenger, limit=limit)
    print_table("predictions by model version", found.versions, "version rows labelled accuracy mean_confidence")
    print_table("quarantine", found.quarantined, "reason rows replayed")
    print_table(
        "champion and challenger on the same images",
        found.agreement,
        "challenger rows agreement labelled judged champion_accuracy challenger_accuracy only_champion_right "
        "only_challenger_right fitted fitted_champion_accuracy fitted_challenger_accuracy",
    )
    print_table(
        "most frequent disagreements",
        found.disagreements,
        "champion_label challenger_label rows champion_right challenger_right",
    )
    print_table(
        "drift from held-out images, newest micro-batches first; alarm is for the images since the last window",
        found.drift,
        "batch_id version images psi_max component psi_mean mean_shift spread low_confidence window_images window_psi "
        "p_value alarm",
    )
    if not found.agreement:
        out.print("no challenger has been scored beside the champion", highlight=False)
    return write_json(json_file, asdict(found))


def _read_page(context: typer.Context, model: int | None, against: int | None, live: bool) -> "ModelReport":
    settings = settings_of(context)
    if live:
        if against is not None:
            raise ServiceError("--against compares on a holdout, --live reports on the stream: give one of the two")
        from streaming.reports.live_report import read_live_report

        with err.status("reading the predictions …"):
            return read_live_report(settings, model)
    from streaming.reports.model_report import read_model_report

    if model is None or model == against:
        raise ServiceError(f"--against compares two versions, got {model} and {against}")
    with err.status(f"evaluating version {model} …"):
        return read_model_report(settings, model, against)


def _check_output(output: Path) -> None:
    """See that the page can be written, before the minute that the figures may take."""
    parent = next((folder for folder in output.absolute().parents if folder.exists()), output)
    if output.is_dir() or not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ServiceError(f"--output names a file in a folder that can be written to, got {output}")


def _write_page(found: "ModelReport", output: Path, json_file: Path | None) -> None:
    from streaming.reports.report_content import summary_of
    from streaming.reports.report_page import write_page

    with err.status("drawing …"):
        figures = write_page(found, output)
    evaluation, compared = found.evaluation, found.comparison
    low, high = evaluation.accuracy_interval()
    out.print(
        f"{found.title}: accuracy {evaluation.accuracy:.4f} ({low:.4f} to {high:.4f}), macro F1 "
        f"{evaluation.macro_f1:.4f}, on {found.about}",
        highlight=False,
        markup=False,
    )
    if compared:
        out.print(
            f"gain in {compared.paired.objective.name} {compared.paired.gain.value:+.4f} ({compared.gain.low:+.4f} to "
            f"{compared.gain.high:+.4f}) against version {compared.against} on the same "
            f"{compared.counts.rows:,} images",
            highlight=False,
        )
    out.print(f"{output} ({len(figures)} figures in {figures[0].parent})", highlight=False, markup=False)
    write_json(json_file, summary_of(found) | {"output": str(output), "figures": [str(file) for file in figures]})
