"""`imagestream label`: add labels and corrections from a CSV to the table `labels`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from streaming.cli.app import EXIT_FAILED, JsonOption, app, settings_of, write_json
from streaming.cli.command_line import IMAGES
from streaming.cli.console import err, out


@app.command(panel=IMAGES)
def label(
    context: typer.Context,
    csv: Annotated[
        Path, typer.Argument(metavar="CSV", help="CSV with the columns label and image_id, path (or source), or name.")
    ],
    by: Annotated[str, typer.Option(metavar="NAME", help="Author of the labels, recorded with them.")] = "label",
    json_file: JsonOption = None,
) -> None:
    """Add or correct the labels of images, for the next retraining and report.

    An image is identified by its id, by its source (the path that it was published from) or by its file name. The
    latest label of an image takes precedence over earlier ones and over the label in its message. Importing the same
    file again adds nothing. The exit code is 1 if a row could not be used.

    Example: imagestream label corrections.csv --by review
    """
    from streaming.images.corrections import add_labels

    result = add_labels(settings_of(context), csv, by)
    for why, n in result.left_out.items():
        shown = ", ".join(result.examples.get(why, []))
        err.print(
            f"left out {n:,}: {why} ({shown}{', …' if n > len(result.examples.get(why, [])) else ''})", style="yellow"
        )
    line = f"{result.added:,} labels added, {result.unchanged:,} already present"
    if result.superseded:
        line += f", {result.superseded:,} skipped because they were corrected later"
    out.print(line)
    write_json(json_file, asdict(result))
    if result.left_out:
        raise typer.Exit(EXIT_FAILED)
