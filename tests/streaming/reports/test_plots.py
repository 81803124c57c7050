"""Figures show the evaluation for any names and any number of classes."""

import io
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from models.evaluation import Evaluation
from models.evaluation_sums import EvaluationSums
from streaming.reports import plots
from streaming.reports.plots import Sample, png, short

HOSTILE = ("$x^{2", "<b>bold</b>", "_hidden", "a\nb\u202ec", "猫", "$", "\\frac{1}{2}$ and $", "x" * 300)


def evaluation(classes: tuple[str, ...], rows: int = 400) -> Evaluation:
    generator = np.random.default_rng(0)
    truth = generator.integers(0, len(classes), rows)
    sums = EvaluationSums(classes, len(classes))
    sums.add(generator.normal(size=(rows, len(classes))) + 2 * np.eye(len(classes))[truth], truth)
    return sums.result()


def sample(label: str, predicted: str, pixels: np.ndarray | None = None) -> Sample:
    return Sample("ab" * 32, label, predicted, 0.5, pixels)


def size_of(image: bytes) -> tuple[int, int]:
    with Image.open(io.BytesIO(image)) as opened:
        assert opened.format == "PNG"
        return opened.size


@pytest.mark.parametrize("style", ["light", "dark"])
@pytest.mark.parametrize("classes", [HOSTILE, tuple("ab"), tuple(map(str, range(45)))], ids=["hostile", "two", "many"])
def test_every_figure_is_drawn_for_any_class_names(classes: tuple[str, ...], style: plots.Style) -> None:
    found = evaluation(classes)
    for draw in (
        lambda: plots.confusion_figure(found),
        lambda: plots.roc_figure(found),
        lambda: plots.reliability_figure(found),
        lambda: plots.balance_figure(classes, {"for training": found.support, "held out": found.support}),
        lambda: plots.samples_figure([sample(name, classes[0]) for name in classes[:9]]),
    ):
        width, height = size_of(png(draw, style, dpi=60))
        assert width > 200
        assert height > 100


def texts(figure: Figure) -> set[str]:
    return {text.get_text() for axes in figure.axes for text in (*axes.texts, *axes.get_xticklabels())}


def test_confusion_and_roc_figures_show_the_evaluation() -> None:
    found = evaluation(("a", "b", "c"))
    assert {f"{count:,}" for count in found.confusion.flat if count} <= texts(plots.confusion_figure(found))
    axes = plots.roc_figure(found).axes[0]
    worst = int(np.argmin(found.auc))
    np.testing.assert_array_equal(np.transpose(found.roc_curve(worst)), axes.lines[1].get_xydata())
    legend = axes.get_legend()
    assert legend is not None
    assert legend.get_texts()[0].get_text() == f"{found.classes[worst]}  {found.auc[worst]:.4f}"
    assert legend.get_texts()[-1].get_text() == f"mean  {found.macro_auc:.4f}"


def test_reliability_and_variance_figures_show_their_values() -> None:
    found = evaluation(("a", "b", "c"))
    confidence, right, _ = found.reliability_curve()
    line = plots.reliability_figure(found).axes[0].lines[1]
    np.testing.assert_array_equal(line.get_xydata(), np.stack([confidence, right], axis=1))
    figure = plots.variance_figure(np.array([0.5, 0.3, 0.2], np.float32), 2)
    np.testing.assert_allclose(figure.axes[0].lines[0].get_ydata(), [0.5, 0.8, 1.0], rtol=1e-6)
    assert "2 kept: 80.0%" in texts(figure)


def test_samples_have_titles_and_missing_images_are_marked() -> None:
    figure = plots.samples_figure([sample("cat", "dog"), sample("cat", "cat", np.zeros((4, 4, 3), np.uint8))])
    first, second, *rest = figure.axes
    assert first.get_title() == "✗ true cat / predicted dog\nconfidence 50%"
    assert second.get_title() == "✓ true cat / predicted cat\nconfidence 50%"
    assert first.texts[0].get_text() == "image not\navailable"
    assert (len(second.images), len(rest)) == (1, 7)


def test_class_names_are_shortened_and_escaped() -> None:
    assert short("a\nb\u202ec") == "a\ufffdb\ufffdc"
    assert short("$x$") == r"\$x\$"
    assert short("x" * 300) == "x" * 17 + "…"


def test_predictions_are_plotted_from_their_files(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    row = {"source": str(tmp_path / "red.png"), "label_true": "red", "label": "red", "confidence": 0.9}
    plots.plot_predictions([row], tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as grid:
        colours = grid.convert("RGB").getcolors(1 << 24)
    assert (255, 0, 0) in {colour for _, colour in colours or []}
