"""`imagestream label`: corrections and late labels from a CSV, into the table `labels`."""

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
        Path,
        typer.Argument(metavar="CSV", help="A file with the columns label, and image_id, path (or source), or name."),
    ],
    by: Annotated[str, typer.Option(metavar="NAME", help="Who says so; kept with the labels.")] = "label",
    json_file: JsonOption = None,
) -> None:
    """Give images their true labels, or other ones; the next retraining and report go by them.

    An image is named by its id, by its source (the path that it was published from) or by its file name. Of several
    labels of an image the latest counts, and it counts more than the one that came with the image. The same file again
    adds nothing. Exit code 1 if a row could not be used.

    Example: imagestream label corrections.csv --by review
    """
    from streaming.images.corrections import add_labels

    result = add_labels(settings_of(context), csv, by)
    for why, n in result.left_out.items():
        shown = ", ".join(result.examples.get(why, []))
        err.print(
            f"left out {n:,}: {why} ({shown}{', …' if n > len(result.examples.get(why, [])) else ''})",
            style="yellow",
        )
    line = f"{result.added:,} labels added, {result.unchanged:,} images had theirs already"
    if result.superseded:
        line += f", {result.superseded:,} of this file were corrected since and stay as they are"
    out.print(line)
    write_json(json_file, asdict(result))
    if result.left_out:
        raise typer.Exit(EXIT_FAILED)
