"""Drift: do the images that arrive still look like those that the model was evaluated on?"""

from typing import Any

import streamlit as st

from streaming.dashboard import charts, data
from streaming.dashboard.context import Dashboard
from streaming.dashboard.layout import ask, cards, empty, percent, title

PSI = {"psi_max": "farthest component", "psi_mean": "mean of components", "psi_expected": "mean without drift"}
LOW = {"low_confidence": "now", "low_confidence_in_training": "reference"}
LOW_CARD = "Answers less confident than nine in ten held-out images, of the last micro-batch"


def show(dashboard: Dashboard) -> None:  # noqa: ARG001  every page takes it
    """Draw the page."""
    title("Drift", "How far the images are, to the model, from those that were held out when it was trained.")
    rows = ask(data.drift)
    if not rows:
        empty("Nothing to tell yet: distances are kept of micro-batches of 100 images and more.")
        return
    last = rows[-1]
    judged = [row for row in rows if row["p_value"] is not None]
    cards(
        [
            ("Now", *_verdict(judged[-1] if judged else None)),
            ("p-value", f"{judged[-1]['p_value']:.2g}" if judged else "–", "Of the last window, all components tested"),
            ("PSI, mean", f"{last['psi_mean']:.3f}", "Over the components, of the last micro-batch"),
            ("Low confidence", percent(last["low_confidence"]), LOW_CARD),
            ("Reference", percent(last["low_confidence_in_training"]), "The same share of the held-out images"),
        ]
    )
    if judged:
        with st.container(border=True):
            st.markdown("**Drift test**: the p-value of each window, and its limit for one false alarm in 100 days")
            st.altair_chart(charts.drift_windows(judged), key="windows")
    with st.container(border=True):
        st.markdown("**Population stability index** of each micro-batch, and what chance alone gives")
        st.altair_chart(charts.drift(rows, PSI, "PSI"), key="psi")
    left, right = st.columns(2)
    with left, st.container(border=True):
        st.markdown("**Mean shift**, in spreads of the held-out images")
        st.altair_chart(charts.drift(rows, {"mean_shift": "largest shift"}, "spreads"), key="shift")
    with right, st.container(border=True):
        st.markdown("**Low confidence**: share of answers in the reference's lowest tenth")
        st.altair_chart(charts.drift(rows, LOW, "share"), key="low")


def _verdict(window: dict[str, Any] | None) -> tuple[str, str]:
    """What the last window that was judged says, and what that means."""
    if window is None:
        return (
            "not judged",
            "Too few images yet, or a model of an earlier version, whose reference is of training images",
        )
    images = f"{window['window_images']:,.0f} images"
    if window["alarm"]:
        return "drift", f"{images} differ by more than chance, and by a PSI of 0.1 or more"
    if window["p_value"] <= window["p_limit"]:
        return "slightly different", f"{images} differ by more than chance, but by a PSI of less than 0.1"
    return "as held out", f"{images} differ by no more than chance"
