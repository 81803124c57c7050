"""Plot of the trade-offs of a search: accuracy against throughput, or against the number of components."""

from pathlib import Path

from streaming.training.tune import Tuned

MARKERS = {"logistic_regression": "o", "mlp": "^"}
COLOURS = {"pca": "tab:blue", "randomized_pca": "tab:cyan", "random": "tab:orange", "none": "tab:gray"}


def plot_trade_offs(tuned: Tuned, path: Path) -> None:
    """Write a PNG: a point per trial, coloured by projection, shaped by classifier; a line through the Pareto front."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    by_speed = len({one.variant for one in tuned.outcomes}) > 1
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    where = {one.number: (one.images_per_s if by_speed else one.components, one.accuracy) for one in tuned.outcomes}
    for one in tuned.outcomes:
        marker, colour = MARKERS[one.options.classifier], COLOURS[one.options.projection]
        axes.scatter(*where[one.number], marker=marker, color=colour, alpha=0.8)
    axes.plot(*zip(*(where[number] for number in tuned.front), strict=True), color="black", linewidth=1)
    axes.scatter(*where[tuned.best.number], s=160, facecolors="none", edgecolors="crimson")
    axes.set_xscale("linear" if by_speed else "log")
    axes.set_xlabel("images per second on one core" if by_speed else "number of components")
    axes.set_ylabel(f"accuracy on {tuned.rows[1]:,} validation images")
    seen = {one.options.projection for one in tuned.outcomes}, {one.options.classifier for one in tuned.outcomes}
    handles = [Line2D([], [], marker="s", linestyle="", color=COLOURS[name], label=name) for name in sorted(seen[0])]
    handles += [Line2D([], [], marker=MARKERS[name], linestyle="", color="k", label=name) for name in sorted(seen[1])]
    handles += [Line2D([], [], color="black", linewidth=1, label="Pareto front")]
    axes.legend(handles=handles, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, format="png")
