"""Renders a report as a self-contained HTML file, without scripts or requests, in a light and a dark theme.

The template is `report_page.html`. Jinja2 escapes markup in untrusted text (names of classes, files, libraries), and
`printable` replaces characters that hide or reorder others.
"""

import base64
import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from models.evaluation import FEW_ROWS, Evaluation, Interval
from streaming.reports import plots
from streaming.reports.plots import png
from streaming.reports.report_content import CONFIDENCE, ModelReport, VersionComparison

TEMPLATE = Path(__file__).with_name("report_page.html")
MAX_TEXT = 200  # characters


def write_page(report: ModelReport, path: Path) -> list[Path]:
    """Write the report to `path` and its figures as PNG files to a folder next to it; return the figures' files."""
    figures = figures_of(report)
    folder = path.parent / f"{path.stem}-figures"
    folder.mkdir(parents=True, exist_ok=True)
    written = {folder / f"{name}.png": png(draw) for name, (draw, _, _) in figures.items()}
    for file, content in written.items():
        file.write_bytes(content)
    path.write_text(page(report, figures, [*written.values()]), encoding="utf-8")
    return [*written]


Figures = dict[str, tuple[Callable[[], Figure], str, str]]  # name → drawing function, title, caption


def figures_of(report: ModelReport) -> Figures:
    """Return the figures for which there are data."""
    found = report.evaluation
    figures: Figures = {
        "confusion": (
            lambda: plots.confusion_figure(found),
            "Confusion matrix",
            "Rows are true classes, columns predicted ones; darker cells are a larger share of their row.",
        )
    }
    if np.isfinite(found.macro_auc):
        figures["roc"] = (
            lambda: plots.roc_figure(found),
            "ROC curves",
            "Each class against the rest; the classes with the smallest areas are named.",
        )
    if found.reliability[0].any():
        figures["reliability"] = (
            lambda: plots.reliability_figure(found),
            "Reliability curve",
            "Accuracy by confidence: the model is overconfident below the diagonal and underconfident above it.",
        )
    if report.variance is not None:
        ratio, kept = report.variance
        figures["variance"] = (
            lambda: plots.variance_figure(ratio, kept),
            "Explained variance",
            f"The first {kept:,} of {len(ratio):,} principal components are kept.",
        )
    figures["balance"] = (
        lambda: plots.balance_figure(found.classes, report.balance),
        "Class balance",
        "Number of labelled images per class.",
    )
    if report.samples:
        figures["samples"] = (
            lambda: plots.samples_figure(report.samples),
            "Samples with true and predicted class",
            "A random sample by image hash; ✗ marks wrong predictions.",
        )
    return figures


def page(report: ModelReport, figures: Figures, light: Sequence[bytes]) -> str:
    """Return the report as HTML.

    Args:
        light: the figures as PNG in the light style.
    """
    environment = Environment(
        loader=FileSystemLoader(TEMPLATE.parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"inline": _inline, "as_png": _as_png, "format_as": format}
    return environment.get_template(TEMPLATE.name).render(
        report=report,
        headline=_headline(report.evaluation),
        comparison=_comparison(report.comparison) if report.comparison else None,
        per_class=_per_class(report.evaluation),
        figures=[
            {"title": title, "caption": caption, "light": bright, "dark": png(draw, "dark")}
            for (draw, title, caption), bright in zip(figures.values(), light, strict=True)
        ],
    )


def printable(value: object) -> object:
    """Untrusted text without characters that hide or reorder others, and shortened to `MAX_TEXT` characters."""
    if isinstance(value, Markup):
        return value
    shown = "".join(character if character.isprintable() else "\ufffd" for character in str(value)[: MAX_TEXT + 1])
    return shown if len(shown) <= MAX_TEXT else shown[: MAX_TEXT - 1] + "…"


def _headline(found: Evaluation) -> list[tuple[str, str, str]]:
    """(name, value, explanation) of each metric that is defined."""
    level = f"{CONFIDENCE:.0%}"
    figures = [
        ("Accuracy", f"{found.accuracy:.2%}", f"{level}: {_between(found.accuracy_interval(CONFIDENCE), '.2%')}"),
        ("Macro F1", f"{found.macro_f1:.4f}", _macro_f1_interval(found, level)),
        ("Log loss", f"{found.log_loss:.4f}", f"nats; {found.log_loss_from_logits:.4f} from logits, unclipped"),
        ("ROC AUC", f"{found.macro_auc:.4f}", f"mean, one-vs-rest; weighted {found.weighted_auc:.4f}"),
        ("Calibration error", f"{found.calibration_error:.4f}", "mean difference between confidence and accuracy"),
        ("Images", f"{found.rows:,}", f"{found.correct:,} correct, {found.rows - found.correct:,} wrong"),
    ]
    return [figure for figure in figures if figure[1] != "nan"]


def _macro_f1_interval(found: Evaluation, level: str) -> str:
    interval = _between(found.macro_f1_interval(CONFIDENCE), ".4f")
    if not found.rare_classes:
        return f"{level}: {interval}"
    return f"{interval}; below {level} confidence: {found.rare_classes} classes have fewer than {FEW_ROWS} images"


def _comparison(compared: VersionComparison) -> dict[str, Any]:
    paired, ours, theirs = compared.paired, compared.ours, compared.theirs
    counts = paired.counts
    low, high = compared.gain
    verdict = "better than" if low > 0 else "worse than" if high < 0 else "not significantly different from"
    sentence = (
        f"On {counts.rows:,} images on which neither version was fitted, this version is {verdict} version "
        f"{compared.against}: its gain in {paired.objective.name} is {paired.gain.value:+.4f}, with {CONFIDENCE:.0%} "
        f"confidence between {low:+.4f} and {high:+.4f} (paired Bayesian bootstrap)."
    )
    names = {"accuracy": "accuracy", "macro_f1": "macro F1", "log_loss": "log loss", "macro_auc": "ROC AUC"}
    names |= {"calibration_error": "calibration error"}
    mine, other = ours.as_metrics(), theirs.as_metrics()
    rows = [
        [label, f"{mine[name]:.4f}", f"{other[name]:.4f}", f"{mine[name] - other[name]:+.4f}"]
        for name, label in names.items()
        if name in mine and name in other
    ]
    pairs = [
        ["both correct", f"{counts.both:,}"],
        ["only this version correct", f"{counts.only_candidate:,}"],
        [f"only version {compared.against} correct", f"{counts.only_champion:,}"],
        ["neither correct", f"{counts.neither:,}"],
    ]
    return {"against": compared.against, "sentence": Markup.escape(sentence), "metrics": rows, "pairs": pairs}


def _per_class(found: Evaluation) -> list[list[str]]:
    rows = []
    for index in np.flatnonzero(found.occurring):
        area = found.auc[index]
        shares = [found.precision[index], found.recall[index], found.f1[index]]
        rows.append([found.classes[index], *_four(shares), f"{area:.4f}" if np.isfinite(area) else "–"])
        rows[-1].append(f"{found.support[index]:,}")
    figures = (found.precision, found.recall, found.f1)
    for name, mean, area in (
        ("macro average", found.macro, found.macro_auc),
        ("weighted average", found.weighted, found.weighted_auc),
    ):
        last = f"{area:.4f}" if np.isfinite(area) else "–"
        rows.append([name, *_four(mean(figure) for figure in figures), last, f"{found.rows:,}"])
    return rows


def _between(interval: Interval, form: str) -> str:
    return f"{interval.low:{form}} to {interval.high:{form}}"


def _four(values: Iterable[float]) -> list[str]:
    return [f"{value:.4f}" for value in values]


def _as_png(pixels: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _inline(data: bytes) -> Markup:
    return Markup("data:image/png;base64,{}").format(base64.b64encode(data).decode())
