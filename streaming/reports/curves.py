"""Learning curves of a distributed training."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from streaming.distributed.history import History
from streaming.wording import counted


def learning_curves(history: History) -> Figure:
    """Plot log loss and accuracy by epoch on training and validation images, with a thin line per worker."""
    figure = Figure(figsize=(8.4, 3.2))
    loss, accuracy = figure.subplots(1, 2)
    epochs = [one.epoch + 1 for one in history.epochs]
    for axes, name in ((loss, "log_loss"), (accuracy, "accuracy")):
        for side, colour in (("training", "C0"), ("validation", "C1")):
            counts = [getattr(one, side) for one in history.epochs]
            if any(one.rows for one in counts):
                axes.plot(epochs, [getattr(one, name) for one in counts], colour, label=side, linewidth=2)
        _draw_workers(axes, history, name)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3, linewidth=0.5)
    loss.set_ylabel("log loss")
    accuracy.set_ylabel("accuracy")
    accuracy.yaxis.set_major_formatter(PercentFormatter(1.0))
    loss.legend(frameon=False)
    figure.suptitle(f"{history.mode}, per {history.frequency}, {counted(history.workers, 'worker')}", fontsize=10)
    return figure


def _draw_workers(axes: Axes, history: History, name: str) -> None:
    for worker in range(history.workers):
        own = [
            (one.epoch + 1, each.training) for one in history.epochs for each in one.workers if each.worker == worker
        ]
        points = [(epoch, getattr(counts, name)) for epoch, counts in own if counts.rows]
        if points:
            axes.plot(*zip(*points, strict=True), color="C0", alpha=0.25, linewidth=0.8)
