"""`imagestream report`: predictions and quality of the models, as tables or an HTML page."""

import os
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from streaming.cli.app import JsonOption, app, settings_of, write_json
from streaming.cli.command_line import MODELS
from streaming.cli.console import Spinner, err, out
from streaming.cli.output import FormatOption, list_rows, print_table
from streaming.cli.output_formats import Format
from streaming.errors import UsageError
from streaming.wording import counted

if TYPE_CHECKING:
    from streaming.reports.report_content import ModelReport

PAGE = Path("report.html")


class Section(StrEnum):
    """A table of the report."""

    VERSIONS = "versions"
    QUARANTINED = "quarantined"
    AGREEMENT = "agreement"
    DISAGREEMENTS = "disagreements"
    DRIFT = "drift"


SECTIONS: dict[Section, tuple[str, dict[str, type]]] = {
    Section.VERSIONS: (
        "predictions by model version",
        {"version": int, "rows": int, "labelled": int, "accuracy": float, "mean_confidence": float},
    ),
    Section.QUARANTINED: ("quarantine", {"reason": str, "rows": int, "replayed": int}),
    Section.AGREEMENT: (
        "champion and challenger on the same images",
        {
            "challenger": int,
            "rows": int,
            "agreement": float,
            "labelled": int,
            "judged": int,
            "champion_accuracy": float,
            "challenger_accuracy": float,
            "only_champion_right": int,
            "only_challenger_right": int,
            "fitted": int,
            "fitted_champion_accuracy": float,
            "fitted_challenger_accuracy": float,
        },
    ),
    Section.DISAGREEMENTS: (
        "most frequent disagreements",
        {"champion_label": str, "challenger_label": str, "rows": int, "champion_right": int, "challenger_right": int},
    ),
    Section.DRIFT: (
        "drift relative to held-out images, newest micro-batches first; the alarm concerns the images since the last "
        "window",
        {
            "batch_id": int,
            "version": int,
            "images": int,
            "psi_max": float,
            "component": int,
            "psi_mean": float,
            "mean_shift": float,
            "spread": float,
            "low_confidence": float,
            "window_images": int,
            "window_psi": float,
            "p_value": float,
            "alarm": bool,
        },
    ),
}


@app.command(panel=MODELS)
def report(
    context: typer.Context,
    challenger: Annotated[
        int | None, typer.Option(min=1, help="Version of the challenger to show; default: all.")
    ] = None,
    limit: Annotated[
        int,
        typer.Option(min=1, help="Number of the most frequent disagreements and of the newest micro-batches to show."),
    ] = 10,
    model: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Version to evaluate on its held-out images, as an HTML page."),
    ] = None,
    against: Annotated[
        int | None, typer.Option(min=1, metavar="M", help="Version to compare with --model on the same images.")
    ] = None,
    live: Annotated[
        bool, typer.Option("--live", help="Evaluate the stored predictions of labelled images, as an HTML page.")
    ] = False,
    section: Annotated[
        Section | None,
        typer.Option("--table", help="Table to show; default: all of them, or versions with --format or --output."),
    ] = None,
    format_: FormatOption = Format.TABLE,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="File to write the rows to; - for standard output. With --model or --live, file to write the page to "
            "(default: report.html); its figures are written to a folder next to it.",
        ),
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Show accuracy and confidence per model version, the quarantine, and champion and challenger side by side.

    Accuracy is over images whose label was sent with the message or added later. With --model or --live, a
    self-contained HTML file is written instead: metrics with confidence intervals, plots, samples and mistakes.

    Example: imagestream report, or: imagestream report --model 2 --against 1 --output report.html
    """
    if model is not None or live:
        if format_ is not Format.TABLE or section is not None:
            raise UsageError("--model and --live write a page: expected neither --format nor --table with them")
        page = output or PAGE
        _check_output(page)
        return _write_page(_read_page(context, model, against, live), page, json_file)
    if against is not None:
        raise UsageError("--against M compares two versions: give the other with --model N")

    from streaming.reports.report import read_report

    found = read_report(settings_of(context), challenger=challenger, limit=limit)
    tables = asdict(found)
    if format_ is not Format.TABLE or output is not None:
        chosen = section or Section.VERSIONS
        list_rows(tables[chosen], SECTIONS[chosen][1], format_, output)
    else:
        for name in [section] if section else Section:
            title, columns = SECTIONS[name]
            print_table(title, tables[name], " ".join(columns))
    if not found.agreement and section in (None, Section.AGREEMENT):
        err.print("no challenger has been scored alongside the champion")
    return write_json(json_file, tables)


def _read_page(context: typer.Context, model: int | None, against: int | None, live: bool) -> "ModelReport":
    settings = settings_of(context)
    if live:
        if against is not None:
            raise UsageError(
                "--against compares on held-out images, --live reports on the stream: give only one of the two"
            )
        from streaming.reports.live_report import read_live_report

        with Spinner("reading the predictions"):
            return read_live_report(settings, model)
    from streaming.reports.model_report import read_model_report

    if model is None or model == against:
        raise UsageError(f"--against compares two versions, got {model} and {against}")
    with Spinner(f"evaluating version {model}"):
        return read_model_report(settings, model, against)


def _check_output(output: Path) -> None:
    """Check that the page can be written, before the evaluation, which may take a minute.

    Raises:
        UsageError: it cannot.
    """
    parent = next((folder for folder in output.absolute().parents if folder.exists()), output)
    if output.is_dir() or not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UsageError(f"--output: expected a file in a writable folder, got {output}")


def _write_page(found: "ModelReport", output: Path, json_file: Path | None) -> None:
    from streaming.reports.report_content import summary_of
    from streaming.reports.report_page import write_page

    with Spinner("drawing"):
        figures = write_page(found, output)
    evaluation, compared = found.evaluation, found.comparison
    low, high = evaluation.accuracy_interval()
    out.print(
        f"{found.title}: accuracy {evaluation.accuracy:.4f} ({low:.4f} to {high:.4f}), macro F1 "
        f"{evaluation.macro_f1:.4f}, on {found.about}"
    )
    if compared:
        out.print(
            f"gain in {compared.paired.objective.name} {compared.paired.gain.value:+.4f} ({compared.gain.low:+.4f} to "
            f"{compared.gain.high:+.4f}) against version {compared.against} on the same "
            f"{counted(compared.counts.rows, 'image')}"
        )
    out.print(f"{output} ({len(figures)} figures in {figures[0].parent})")
    write_json(json_file, summary_of(found) | {"output": str(output), "figures": [str(file) for file in figures]})
