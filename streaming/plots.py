"""Pictures for people who would rather look than read."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

GRID = 3


def plot_predictions(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """A 3×3 grid of images titled true/predicted, wrong ones in red.

    Args:
        rows: up to nine of source (a file), label_true, label, confidence.
        path: where the PNG goes.
    """
    from matplotlib.figure import Figure
    from PIL import Image

    figure = Figure(figsize=(6, 6.8), layout="constrained")
    for axes, row in zip(figure.subplots(GRID, GRID).flat, rows, strict=False):
        with Image.open(row["source"]) as image:
            axes.imshow(image.convert("RGB"))
        right = row["label"] == row["label_true"]
        axes.set_title(
            f"true {row['label_true']} / predicted {row['label']}\n{row['confidence']:.0%} sure",
            color="black" if right else "crimson",
            fontsize=9,
        )
    for axes in figure.axes:
        axes.set_axis_off()
    figure.suptitle("nine predictions from the Delta table, picked by the images' hashes", fontsize=10)
    figure.savefig(path, dpi=120)
