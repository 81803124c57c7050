"""Figures of a report.

Each function draws a figure in the current style; `png` renders it in one of `STYLES`. The colours are those of Okabe
and Ito ("Color Universal Design", 2008), which are distinguishable with colour blindness, lightened for the dark style.
"""

import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from models.arrays import Features
from models.decode import BadImage, decode, read_limited
from models.evaluation import Evaluation

GRID = 3
MAX_NAME = 18  # maximum length of a class name in a figure; tables show full names
MAX_NUMBERED = 20  # maximum number of classes with counts in the cells of a confusion matrix
MAX_NAMED = 40  # maximum number of classes with names along an axis
WORST_CURVES = 5  # number of named ROC curves
DPI = 150
THUMBNAIL = (112, 112)  # pixels

Style = Literal["light", "dark"]


def _style(surface: str, ink: str, muted: str, colours: Sequence[str]) -> dict[str, Any]:
    return {
        "figure.facecolor": surface,
        "axes.facecolor": surface,
        "savefig.facecolor": surface,
        "legend.facecolor": surface,
        "text.color": ink,
        "axes.labelcolor": ink,
        "xtick.color": ink,
        "ytick.color": ink,
        "axes.edgecolor": muted,
        "grid.color": muted,
        "legend.edgecolor": muted,
        "axes.prop_cycle": cycler(color=colours),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "font.size": 9,
        "text.parse_math": False,  # class names may contain dollar signs
        "figure.constrained_layout.use": True,
    }


# The first two colours mark correct (blue) and wrong (vermilion) predictions.
STYLES: dict[Style, Any] = {
    "light": _style(
        "#ffffff", "#1c2530", "#9aa5b1", ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"]
    ),
    "dark": _style("#161c24", "#e4e9ef", "#66717e", ["#56b4e9", "#f0803c", "#2fc79b", "#e19cc4", "#f0e442", "#4f8fd0"]),
}


@dataclass(frozen=True)
class Sample:
    """An image with its prediction.

    Attributes:
        image_id: hex SHA-256 of the image, or the id in the message.
        pixels: (H, W, 3) uint8; None if the image is no longer available.
        source: the image's source, if known.
    """

    image_id: str
    label: str
    predicted: str
    confidence: float
    pixels: NDArray[np.uint8] | None = None
    source: str | None = None


def png(draw: Callable[[], Figure], style: Style = "light", dpi: int = DPI) -> bytes:
    """Render a figure as PNG."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLES[style]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a class may be named in any script
        figure = draw()
        figure.set_dpi(dpi)
        canvas: Any = FigureCanvasAgg(figure)
        canvas.print_png(buffer, metadata={"Software": None})  # savefig would draw twice
    return buffer.getvalue()


def short(name: str) -> str:
    """Shorten a name for a figure and escape characters that matplotlib would interpret."""
    printable = "".join(character if character.isprintable() else "\ufffd" for character in name)
    cut = printable if len(printable) <= MAX_NAME else printable[: MAX_NAME - 1] + "…"
    return cut.replace("$", r"\$")


def confusion_figure(found: Evaluation) -> Figure:
    """Plot the confusion matrix, with cells coloured by their share of the true class."""
    counts, size = found.confusion, len(found.classes)
    figure = Figure(figsize=(5.6, 5.0))
    axes = figure.subplots()
    surface, full = matplotlib.rcParams["axes.facecolor"], _colour(0)
    shares = counts / np.maximum(1, found.support)[:, None]
    shown = axes.imshow(shares, cmap=LinearSegmentedColormap.from_list("share", [surface, full]), vmin=0, vmax=1)
    figure.colorbar(shown, ax=axes, shrink=0.8, format=PercentFormatter(1.0), label="share of the true class")
    axes.set(xlabel="predicted", ylabel="true")
    _name_classes(axes, found.classes)
    if size <= MAX_NUMBERED:
        ink = matplotlib.rcParams["text.color"]
        for row, column in zip(*np.nonzero(counts), strict=True):
            colour = surface if shares[row, column] > 0.5 else ink  # noqa: PLR2004
            text = f"{counts[row, column]:,}"
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=max(5, 10 - size // 4))
    return figure


def roc_figure(found: Evaluation) -> Figure:
    """Plot the one-vs-rest ROC curve of each class, naming the worst ones, and their mean."""
    figure, axes = _square("false positive rate", "true positive rate")
    known = [index for index in np.argsort(found.auc) if np.isfinite(found.auc[index])]
    grid = np.linspace(0, 1, 201)
    curves = {index: found.roc_curve(index) for index in known}
    for index in known[WORST_CURVES:]:
        axes.plot(*curves[index], color=matplotlib.rcParams["axes.edgecolor"], linewidth=0.7, alpha=0.7)
    named: dict[Any, str] = {}
    for index in known[:WORST_CURVES]:
        (line,) = axes.plot(*curves[index], linewidth=1.3)
        named[line] = f"{short(found.classes[index])}  {found.auc[index]:.4f}"
    if known:
        mean = np.mean([np.interp(grid, *curves[index]) for index in known], axis=0)
        ink = matplotlib.rcParams["text.color"]
        (line,) = axes.plot([0, *grid], [0, *mean], color=ink, linewidth=2, linestyle="--")
        named[line] = f"mean  {found.macro_auc:.4f}"
        axes.legend([*named], [*named.values()], title="area under the curve", loc="lower right", fontsize=8)
    return figure


def reliability_figure(found: Evaluation) -> Figure:
    """Plot accuracy against confidence; a calibrated model lies on the diagonal."""
    figure = Figure(figsize=(5.2, 5.0))
    curve, bars = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    confidence, right, rows = found.reliability_curve()
    curve.plot([0, 1], [0, 1], color=matplotlib.rcParams["axes.edgecolor"], linestyle=":", label="perfectly calibrated")
    curve.plot(confidence, right, marker="o", markersize=4, color=_colour(0), label="this model")
    curve.set(ylabel="accuracy", xlim=(0, 1), ylim=(0, 1.02))
    curve.legend(loc="upper left", fontsize=8)
    curve.yaxis.set_major_formatter(PercentFormatter(1.0))
    bars.bar(confidence, rows, width=0.05, color=_colour(0))
    bars.set(xlabel="confidence", ylabel="images")
    bars.xaxis.set_major_formatter(PercentFormatter(1.0))
    bars.yaxis.set_major_locator(MaxNLocator(2, integer=True))
    return figure


def variance_figure(ratio: Features, kept: int) -> Figure:
    """Plot the fraction of the variance explained by the first k components, for every k."""
    figure = Figure(figsize=(5.6, 3.8))
    axes = figure.subplots()
    explained = np.cumsum(ratio, dtype=np.float64)
    axes.plot(np.arange(1, len(explained) + 1), explained, color=_colour(0))
    axes.plot([kept, kept], [0, explained[kept - 1]], color=_colour(1), linestyle="--", linewidth=1)
    axes.plot([kept], [explained[kept - 1]], "o", color=_colour(1))
    axes.annotate(
        f"{kept:,} kept: {explained[kept - 1]:.1%}", (kept, explained[kept - 1]), (8, -14), textcoords="offset points"
    )
    axes.set(xlabel="components", ylabel="explained variance", xlim=(0, len(explained)), ylim=(0, 1.02))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    return figure


def balance_figure(classes: Sequence[str], counts: Mapping[str, Sequence[int]]) -> Figure:
    """Plot stacked bars of images per class: `counts` maps the name of a part to its number of images per class."""
    named = len(classes) <= MAX_NAMED
    figure = Figure(figsize=(5.6, max(2.6, 0.9 + 0.28 * len(classes)) if named else 4.0))
    axes = figure.subplots()
    positions, left = np.arange(len(classes)), np.zeros(len(classes))
    for number, (part, values) in enumerate(counts.items()):
        colour = _colour(4 * number)
        axes.barh(positions, values, left=left, height=0.8 if named else 1.0, color=colour, label=part)
        left += np.asarray(values)
    axes.invert_yaxis()
    axes.set(xlabel="images", ylabel="" if named else "classes")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_yticks(positions if named else [], [short(name) for name in classes] if named else [])
    if len(counts) > 1:
        figure.legend(loc="outside upper center", ncols=len(counts), fontsize=8, frameon=False)
    return figure


def samples_figure(samples: Sequence[Sample]) -> Figure:
    """Plot a 3×3 grid of images with true and predicted classes; wrong predictions are marked."""
    figure = Figure(figsize=(5.6, 6.4))
    for axes, sample in zip(figure.subplots(GRID, GRID).flat, samples, strict=False):
        if sample.pixels is None:
            axes.set(facecolor=matplotlib.rcParams["axes.edgecolor"], aspect="equal")
            axes.text(0.5, 0.5, "image not\navailable", ha="center", va="center")
        else:
            axes.imshow(sample.pixels)
        right = sample.label == sample.predicted
        title = f"true {short(sample.label)} / predicted {short(sample.predicted)}"
        title = title.replace(" / ", "\n") if len(title) > 2 * MAX_NAME else title
        axes.set_title(
            f"{'✓' if right else '✗'} {title}\nconfidence {sample.confidence:.0%}",
            color=_colour(0 if right else 1),
            fontsize=8,
        )
    for axes in figure.axes:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    return figure


def plot_predictions(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write a 3×3 grid of images with true and predicted classes as PNG.

    Args:
        rows: up to nine rows of source (a file), label_true, label, confidence.
    """
    samples = []
    for row in rows:
        shown = decode(read_limited(row["source"]), THUMBNAIL)
        pixels = None if isinstance(shown, BadImage) else shown
        samples.append(Sample("", row["label_true"], row["label"], row["confidence"], pixels, row["source"]))

    def draw() -> Figure:
        figure = samples_figure(samples)
        figure.suptitle("nine predictions from the Delta table, sampled by hash", fontsize=10)
        return figure

    path.write_bytes(png(draw))


def _square(across: str, up: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.2, 5.0))
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color=matplotlib.rcParams["axes.edgecolor"], linestyle=":", linewidth=1)
    axes.set(xlabel=across, ylabel=up, xlim=(-0.01, 1), ylim=(0, 1.01), aspect="equal")
    return figure, axes


def _name_classes(axes: Axes, classes: Sequence[str]) -> None:
    if len(classes) > MAX_NAMED:
        return
    names = [short(name) for name in classes]
    upright = max(map(len, names)) <= 2  # noqa: PLR2004
    turned: Any = {} if upright else {"rotation": 60, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(range(len(names)), names, **turned)
    axes.set_yticks(range(len(names)), names)


def _colour(number: int) -> str:
    colours: list[str] = matplotlib.rcParams["axes.prop_cycle"].by_key()["color"]
    return colours[number % len(colours)]
