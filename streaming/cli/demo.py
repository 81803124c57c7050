"""`imagestream demo`: the complete pipeline on real images."""

import shlex
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from streaming.cli.app import EXIT_FAILED, JsonOption, app, program, settings_of, write_json
from streaming.cli.command_line import START
from streaming.cli.console import err, new_table, out, styled
from streaming.errors import ConfigurationError

if TYPE_CHECKING:
    from streaming.jobs.demo import DemoResult

SHOWN = 5
NEXT = (
    'query "SELECT label, count(*) FROM predictions GROUP BY label"',
    "predictions --below 0.5",
    "models list",
    "dashboard",
)


@app.command(panel=START)
def demo(
    context: typer.Context,
    yes: Annotated[bool, typer.Option("--yes", help="Remove an earlier demo without asking.")] = False,
    json_file: JsonOption = None,
) -> None:
    """Run the complete pipeline on real images: broker, training, publishing, streaming, retraining, hot swap.

    The demo has its own home, HOME/demo. If it contains an earlier demo, the command asks before removing it; it never
    removes anything that a demo did not create.

    Example: imagestream demo --json demo.json
    """
    from streaming.jobs.demo import run_demo
    from streaming.reports.plots import plot_predictions

    settings = settings_of(context)
    result = run_demo(
        settings,
        partial(_confirm, yes),
        on_step=lambda name: err.print(f"· {name} …", end="\r" if err.is_terminal else "\n"),
        on_done=lambda step: err.print(f"✓ {step.name}: {step.seconds:.1f} s   "),
    )
    picture = result.settings.work_dir / "report.png"
    plot_predictions(result.sample, picture)
    _print_result(result)
    out.print(f"\npicture: {picture}\ntables:  {result.settings.place.tables}")
    here = f"  {shlex.join([*program(), '--home', result.settings.home])} "
    err.print("\ntry next:", *(here + command for command in NEXT), sep="\n")
    write_json(json_file, result.summary)
    if (
        result.summary["duplicates"]
        or result.summary["predicted"] + result.summary["quarantined"] != result.summary["published"]
    ):
        err.print("error: the tables do not add up to what was published")
        raise typer.Exit(EXIT_FAILED)


def _confirm(yes: bool, question: str) -> bool:
    if yes:
        return True
    if sys.stdin is None or not sys.stdin.isatty():  # None: it is closed, as for a service
        raise ConfigurationError(f"{question} Confirm with --yes, since there is no terminal to prompt on")
    return typer.confirm(question)


def _print_result(result: "DemoResult") -> None:
    found = result.summary
    versions = ", ".join(f"{n} by version {version}" for version, n in found["model_versions"].items())
    out.print(
        f"\npublished {found['published']}: {found['predicted']} predicted ({versions}), "
        f"{found['quarantined']} quarantined, {found['duplicates']} duplicates"
    )
    out.print(f"accuracy {found['accuracy']:.4f}, {found['images_per_second']:.0f} images/s in the micro-batches\n")
    labels = sorted({label for true, predicted, _ in result.confusion for label in (true, predicted)})
    counts = {(true, predicted): n for true, predicted, n in result.confusion}
    confusion = new_table("true", *labels, title="predicted")
    for true in labels:
        confusion.add_row(*map(styled, [true, *(counts.get((true, predicted), "·") for predicted in labels)]))
    out.print(confusion)
    sample = new_table("source", "true", "predicted", "confidence", "version", title="\nsample predictions")
    for row in result.sample[-SHOWN:]:
        source = "/".join(Path(row["source"]).parts[-3:])
        cells = source, row["label_true"], row["label"], f"{row['confidence']:.3f}", row["model_version"]
        sample.add_row(*map(styled, cells))
    out.print(sample)
