"""Renders a report as a self-contained HTML file, without scripts or requests, in a light and a dark theme.

Untrusted text (names of classes, files, libraries) is escaped by `text`.
"""

import base64
import html
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from string import Template

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from models.evaluation import FEW_ROWS, Evaluation, Interval
from streaming.reports import plots
from streaming.reports.plots import Sample, png
from streaming.reports.report_content import CONFIDENCE, ModelReport, VersionComparison

TEMPLATE = Path(__file__).with_name("report_page.html")
MAX_TEXT = 200  # characters


def write_page(report: ModelReport, path: Path) -> list[Path]:
    """Write the report to `path` and its figures as PNG files to a folder next to it; return the figures' files."""
    figures = figures_of(report)
    folder = path.parent / f"{path.stem}-figures"
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, (draw, _, _) in figures.items():
        file = folder / f"{name}.png"
        file.write_bytes(png(draw))
        written.append(file)
    path.write_text(page(report, figures), encoding="utf-8")
    return written


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


def page(report: ModelReport, figures: Figures) -> str:
    """Return the report as HTML."""
    sections = [
        _headline(report.evaluation),
        _fitted(report.fitted) if report.fitted else "",
        _section("Notes", "".join(f"<p>{text(note)}</p>" for note in report.notes)) if report.notes else "",
        _comparison(report.comparison) if report.comparison else "",
        _section("Per class", _per_class(report.evaluation)),
        _section("Figures", _grid("wide", (_figure(*figure) for figure in figures.values()))),
        _section("Most confident mistakes", _mistakes(report.mistakes)),
    ]
    if report.lineage:
        cards = (_card(f"<h3>{text(name)}</h3>{_definitions(values)}") for name, values in report.lineage.items())
        sections.append(_section("Lineage", _grid("wide", cards)))
    template = Template(TEMPLATE.read_text(encoding="utf-8"))
    return template.substitute(
        title=text(report.title), about=text(report.about), sections="\n".join(filter(None, sections))
    )


def text(value: object) -> str:
    """Escape untrusted text: markup, characters that hide or reorder others, and excessive length."""
    shown = "".join(character if character.isprintable() else "\ufffd" for character in str(value)[: MAX_TEXT + 1])
    return html.escape(shown if len(shown) <= MAX_TEXT else shown[: MAX_TEXT - 1] + "…")


def _headline(found: Evaluation) -> str:
    level = f"{CONFIDENCE:.0%}"
    figures = [
        ("Accuracy", f"{found.accuracy:.2%}", f"{level}: {_between(found.accuracy_interval(CONFIDENCE), '.2%')}"),
        ("Macro F1", f"{found.macro_f1:.4f}", _macro_f1_interval(found, level)),
        ("Log loss", f"{found.log_loss:.4f}", f"nats; {found.log_loss_from_logits:.4f} from logits, unclipped"),
        ("ROC AUC", f"{found.macro_auc:.4f}", f"mean, one-vs-rest; weighted {found.weighted_auc:.4f}"),
        ("Calibration error", f"{found.calibration_error:.4f}", "mean difference between confidence and accuracy"),
        ("Images", f"{found.rows:,}", f"{found.correct:,} correct, {found.rows - found.correct:,} wrong"),
    ]
    cards = (
        _card(
            f'<div class="label">{text(name)}</div><div class="value" data-figure="{text(name)}">{text(value)}</div>'
            f'<div class="label">{text(more)}</div>'
        )
        for name, value, more in figures
        if value != "nan"
    )
    return _grid("row", cards)


def _macro_f1_interval(found: Evaluation, level: str) -> str:
    interval = _between(found.macro_f1_interval(CONFIDENCE), ".4f")
    if not found.rare_classes:
        return f"{level}: {interval}"
    return f"{interval}; below {level} confidence: {found.rare_classes} classes have fewer than {FEW_ROWS} images"


def _comparison(compared: VersionComparison) -> str:
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
    tables = [
        _table(["", "this version", f"version {compared.against}", "difference"], rows),
        _table(["", "images"], pairs),
    ]
    return _section(f"Comparison with version {compared.against}", f"<p>{text(sentence)}</p>{_grid('wide', tables)}")


def _per_class(found: Evaluation) -> str:
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
    return _table(["class", "precision", "recall", "F1", "ROC AUC", "images"], rows)


def _mistakes(mistakes: Sequence[Sample]) -> str:
    if not mistakes:
        return "<p>None: all predictions are correct.</p>"
    return _grid("wide", (_card(_answer(one)) for one in mistakes))


def _answer(sample: Sample) -> str:
    if sample.pixels is None:
        picture = '<span class="none">image not available</span>'
    else:
        alt = f"{sample.label}, predicted as {sample.predicted}"
        picture = f'<img src="{_inline(_as_png(sample.pixels))}" alt="{text(alt)}">'
    lines = [
        f'<span class="wrong">✗ {text(sample.predicted)}</span>, confidence {sample.confidence:.1%}',
        f'true class <span class="right">{text(sample.label)}</span>',
        f'<span class="muted">{text(sample.source or "unknown source")}<br>{text(sample.image_id[:16])}…</span>',
    ]
    return f'<div class="answer">{picture}<div>{"<br>".join(lines)}</div></div>'


def _figure(draw: Callable[[], Figure], title: str, caption: str) -> str:
    light, dark = (_inline(png(draw, style)) for style in ("light", "dark"))
    return (
        f'<figure class="card"><h3>{text(title)}</h3><picture>'
        f'<source srcset="{dark}" media="(prefers-color-scheme: dark)"><img src="{light}" alt="{text(title)}: '
        f'{text(caption)}"></picture><figcaption>{text(caption)}</figcaption></figure>'
    )


def _fitted(found: Evaluation) -> str:
    """Return the section on images on which the model may have been fitted."""
    return _section(
        "Training images",
        f"<p>Accuracy {found.accuracy:.2%}, log loss {found.log_loss:.4f} on {found.rows:,} labelled images on which "
        f"the "
        "model may have been fitted. These metrics do not measure its quality on new images, and all other metrics "
        "exclude these images.</p>",
    )


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{text(name)}</th>' for name in heads)
    body = "".join(f"<tr>{''.join(f'<td>{text(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="card scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _definitions(values: Mapping[str, str]) -> str:
    return f"<dl>{''.join(f'<dt>{text(name)}</dt><dd>{text(value)}</dd>' for name, value in values.items())}</dl>"


def _section(title: str, content: str) -> str:
    return f"<section><h2>{text(title)}</h2>{content}</section>"


def _grid(kind: str, cells: Iterable[str]) -> str:
    return f'<div class="{kind}">{"".join(cells)}</div>'


def _card(content: str) -> str:
    return f'<div class="card">{content}</div>'


def _between(interval: Interval, form: str) -> str:
    return f"{interval.low:{form}} to {interval.high:{form}}"


def _four(values: Iterable[float]) -> list[str]:
    return [f"{value:.4f}" for value in values]


def _as_png(pixels: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _inline(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"
