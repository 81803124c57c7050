"""Charts of the dashboard, in colours that are legible in light and dark themes."""

from datetime import UTC, datetime
from typing import Any

import altair as alt
import pandas as pd

from streaming.dashboard.data import Rows, Window
from streaming.dashboard.palette import BLUE, GRAY, ORANGE, RED, SERIES

HEIGHT, BAR = 230, 4  # pixels
FROM = alt.Tooltip("moment:T", title="from", format="%H:%M:%S")
VERSION = alt.Tooltip("version:N", title="model version")
MIN_P = 1e-12  # smaller p-values are drawn here


def throughput(rows: Rows, window: Window, swaps: Rows) -> alt.LayerChart:
    """Images per second, stacked by model version, with a rule at each change of version.

    Args:
        rows: rows of `data.throughput`.
        swaps: rows of `data.swaps`.
    """
    frame = _frame(rows, version=str)
    bars = (
        alt.Chart(frame)
        .mark_bar(size=BAR)
        .encode(
            x=_time(window),
            y=alt.Y("images_per_s:Q", title="images per second", stack="zero"),
            color=_by_version(),
            tooltip=[
                FROM,
                VERSION,
                alt.Tooltip("images_per_s:Q", title="images/s", format=",.1f"),
                alt.Tooltip("images:Q", format=","),
                alt.Tooltip("quarantined:Q", format=","),
            ],
        )
    )
    if not swaps:
        return _sized(alt.layer(bars))
    taken = _frame(swaps)
    taken["swap"] = [f"version {row['before']} → {row['version']}" for row in swaps]
    rules = alt.Chart(taken).mark_rule(strokeDash=[4, 3], color=GRAY, size=1.5)
    return _sized(alt.layer(bars, rules.encode(x="moment:T", tooltip=["swap:N"])))


def latency(rows: Rows, window: Window) -> alt.LayerChart:
    """Median and 95th percentile of the latency from publishing to the committed row, in seconds."""
    frame = _frame(rows).melt(["moment", "images"], ["p50", "p95"], "percentile", "seconds")
    base = alt.Chart(frame).encode(
        x=_time(window),
        y=alt.Y("seconds:Q", title="seconds, publish to row"),
        color=alt.Color("percentile:N", title=None, scale=alt.Scale(domain=["p50", "p95"], range=[BLUE, ORANGE])),
        tooltip=[FROM, "percentile:N", alt.Tooltip("seconds:Q", format=",.2f"), alt.Tooltip("images:Q", format=",")],
    )
    return _sized(alt.layer(base.mark_line(interpolate="monotone"), base.mark_circle(size=28)))


def accuracy(rows: Rows, window: Window) -> alt.LayerChart:
    """Accuracy on labelled predictions, by model version."""
    base = alt.Chart(_frame(rows, version=str)).encode(
        x=_time(window),
        y=alt.Y(
            "accuracy:Q", title="accuracy on labelled images", axis=alt.Axis(format="%"), scale=alt.Scale(domain=[0, 1])
        ),
        color=_by_version(),
        tooltip=[FROM, VERSION, alt.Tooltip("accuracy:Q", format=".1%"), alt.Tooltip("labelled:Q", format=",")],
    )
    return _sized(alt.layer(base.mark_line(interpolate="monotone"), base.mark_circle(size=28)))


def per_step(rows: Rows, window: Window, column: str, title: str) -> alt.LayerChart:
    """Bars of one count over time.

    Args:
        column: the column to sum.
        title: title of the y-axis.
    """
    frame = _frame(rows)
    bars = (
        alt.Chart(frame)
        .mark_bar(size=BAR, color=RED)
        .encode(
            x=_time(window),
            y=alt.Y(f"sum({column}):Q", title=title, axis=alt.Axis(tickMinStep=1)),
            tooltip=[FROM, alt.Tooltip(f"sum({column}):Q", title=title)],
        )
    )
    return _sized(alt.layer(bars))


def counts(rows: Rows, name: str, value: str, title: str) -> alt.LayerChart:
    """A horizontal bar for each row, in the given order.

    Args:
        name: column of the labels.
        value: column of the lengths.
        title: title of the x-axis.
    """
    bars = (
        alt.Chart(_frame(rows))
        .mark_bar(color=BLUE, cornerRadiusEnd=3, height={"band": 0.7})
        .encode(
            x=alt.X(f"{value}:Q", title=title, axis=alt.Axis(tickMinStep=1)),
            y=alt.Y(f"{name}:N", title=None, sort=None, axis=alt.Axis(labelLimit=220, labelOverlap=False)),
            tooltip=[f"{name}:N", alt.Tooltip(f"{value}:Q", format=",")],
        )
    )
    return _sized(alt.layer(bars), 36 * len(rows) + 60)


def probabilities(top: Rows) -> alt.LayerChart:
    """The most probable classes."""
    base = alt.Chart(_frame(top)).encode(y=alt.Y("label:N", sort=None, title=None, axis=alt.Axis(labelLimit=180)))
    bars = base.mark_bar(color=BLUE, cornerRadiusEnd=3, height={"band": 0.65}).encode(
        x=alt.X("probability:Q", title="probability", scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(format="%")),
        tooltip=["label:N", alt.Tooltip("probability:Q", format=".2%")],
    )
    return _sized(alt.layer(bars), 30 * len(top) + 45)


def confusion(rows: Rows) -> alt.LayerChart:
    """Confusion matrix: rows are true classes, columns predicted ones; opacity is the share of the true class."""
    frame = _frame(rows)
    frame["share"] = frame["images"] / frame.groupby("truth")["images"].transform("sum")
    classes = sorted({*frame["truth"], *frame["predicted"]})
    base = alt.Chart(frame).encode(
        x=alt.X(
            "predicted:N",
            title="predicted",
            sort=classes,
            axis=alt.Axis(labelAngle=-45, labelLimit=120, labelOverlap=False),
        ),
        y=alt.Y("truth:N", title="true", sort=classes, axis=alt.Axis(labelLimit=120, labelOverlap=False)),
        tooltip=["truth:N", "predicted:N", "images:Q", alt.Tooltip("share:Q", title="of the true class", format=".1%")],
    )
    # Opacity instead of a colour scale works in light and dark themes.
    boxes = base.mark_rect(color=BLUE, cornerRadius=2).encode(
        opacity=alt.Opacity("share:Q", scale=alt.Scale(domain=[0, 1], range=[0.08, 1]), legend=None)
    )
    layers = [boxes]
    if len(classes) <= 15:  # noqa: PLR2004  more would not be legible
        layers.append(base.mark_text(fontSize=12, color=GRAY).encode(text="images:Q"))
    return _sized(alt.layer(*layers), min(560, max(240, 30 * len(classes) + 70)))


def drift(rows: Rows, names: dict[str, str], title: str) -> alt.LayerChart:
    """Distance of the micro-batches from the held-out images.

    Args:
        rows: a row per micro-batch.
        names: column → its name in the legend.
        title: title of the y-axis.
    """
    frame = _frame(rows)[["moment", "version", "images", *names]].rename(columns=names)
    frame = frame.melt(["moment", "version", "images"], list(names.values()), "figure", "value")
    base = alt.Chart(frame).encode(
        x=alt.X("moment:T", title=None),
        y=alt.Y("value:Q", title=title),
        color=alt.Color(
            "figure:N", title=None, scale=alt.Scale(domain=list(names.values()), range=[BLUE, ORANGE, GRAY])
        ),
        tooltip=["moment:T", "version:N", "images:Q", "figure:N", alt.Tooltip("value:Q", format=".3f")],
    )
    return _sized(alt.layer(base.mark_line(point=True)), HEIGHT + 30)


def drift_windows(rows: Rows) -> alt.LayerChart:
    """p-values of the tested windows, and the significance threshold."""
    frame = _frame(rows)[["moment", "version", "window_images", "window_psi", "p_value", "p_limit", "alarm"]]
    frame["shown"] = frame["p_value"].clip(lower=MIN_P)
    base = alt.Chart(frame).encode(x=alt.X("moment:T", title=None))
    scale = alt.Scale(type="log", domain=[min(1e-6, float(frame["shown"].min())), 1])
    points = base.mark_circle(size=45).encode(
        y=alt.Y("shown:Q", title="p-value", scale=scale, axis=alt.Axis(format=".0e")),
        color=alt.condition("datum.alarm == 1", alt.value(RED), alt.value(BLUE)),
        tooltip=[
            "moment:T",
            "version:N",
            alt.Tooltip("window_images:Q", title="images", format=","),
            alt.Tooltip("window_psi:Q", title="largest PSI", format=".3f"),
            alt.Tooltip("p_value:Q", format=".2e"),
        ],
    )
    limit = base.mark_line(strokeDash=[5, 4], size=1.5, color=ORANGE).encode(y=alt.Y("p_limit:Q", scale=scale))
    return _sized(alt.layer(limit, points), HEIGHT + 30)


def _frame(rows: Rows, **kinds: Any) -> pd.DataFrame:
    return pd.DataFrame(rows).astype(kinds)


def _time(window: Window) -> alt.X:
    domain = [window.since, datetime.now(UTC)]
    return alt.X("moment:T", title=None, scale=alt.Scale(domain=domain), axis=alt.Axis(tickCount=6, labelOverlap=True))


def _by_version() -> alt.Color:
    return alt.Color("version:N", title="model version", scale=alt.Scale(range=SERIES))


def _sized(chart: Any, height: int = HEIGHT) -> alt.LayerChart:
    sized: alt.LayerChart = chart.properties(height=height)
    return sized
