"""The page Drift: whether incoming images still resemble those that the model was evaluated on."""

from typing import Any

import streamlit as st

from streaming.dashboard import charts, data
from streaming.dashboard.context import Dashboard
from streaming.dashboard.layout import cards, empty, panel, percent, run_query, title

PSI = {"psi_max": "farthest component", "psi_mean": "mean of components", "psi_expected": "mean without drift"}
LOW = {"low_confidence": "now", "low_confidence_in_training": "reference"}
LOW_CARD = "Share of predictions in the last micro-batch that are less confident than 90% of the held-out images"


def show(dashboard: Dashboard) -> None:  # noqa: ARG001  the signature of all pages
    """Draw the page."""
    title("Drift", "Distance of incoming images from the model's held-out images.")
    rows = run_query(data.drift)
    if not rows:
        empty("No data yet: drift is computed for micro-batches of at least 100 images.")
        return
    last = rows[-1]
    judged = [row for row in rows if row["p_value"] is not None]
    cards(
        [
            ("Now", *_verdict(judged[-1] if judged else None)),
            ("p-value", f"{judged[-1]['p_value']:.2g}" if judged else "–", "Of the last window, over all components"),
            ("PSI, mean", f"{last['psi_mean']:.3f}", "Mean over the components in the last micro-batch"),
            ("Low confidence", percent(last["low_confidence"]), LOW_CARD),
            ("Reference", percent(last["low_confidence_in_training"]), "Same share for the held-out images"),
        ]
    )
    if judged:
        what = "**Drift test**: p-value of each window, with the threshold for one false alarm in 100 days"
        panel(what, charts.drift_windows(judged), "windows")
    what = "**Population stability index** of each micro-batch, and its expectation without drift"
    panel(what, charts.drift(rows, PSI, "PSI"), "psi")
    left, right = st.columns(2)
    with left:
        chart = charts.drift(rows, {"mean_shift": "largest shift"}, "standard deviations")
        panel("**Mean shift**, in standard deviations of the held-out images", chart, "shift")
    with right:
        what = "**Low confidence**: share of predictions below the reference's 10th percentile"
        panel(what, charts.drift(rows, LOW, "share"), "low")


def _verdict(window: dict[str, Any] | None) -> tuple[str, str]:
    """Return the verdict on the last tested window and its explanation."""
    if window is None:
        return (
            "not tested",
            "Too few images yet, or a model of an earlier release, whose reference consists of training images",
        )
    images = f"{window['window_images']:,.0f} images"
    if window["alarm"]:
        return "drift", f"{images} differ significantly, with a PSI of at least 0.1"
    if window["p_value"] <= window["p_limit"]:
        return "minor drift", f"{images} differ significantly, but with a PSI of less than 0.1"
    return "no drift", f"{images} do not differ significantly"
