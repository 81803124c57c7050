"""Drift: do the images that come still look like those of the training?"""

import streamlit as st

from streaming.dashboard import charts, data
from streaming.dashboard.context import Dashboard
from streaming.dashboard.layout import ask, cards, empty, percent, title

PSI = {"psi_max": "farthest component", "psi_mean": "mean of components"}
LOW = {"low_confidence": "now", "low_confidence_in_training": "in training"}


def show(dashboard: Dashboard) -> None:  # noqa: ARG001  every page takes it
    """Draw the page."""
    title("Drift", "How far the images of each micro-batch are, to the model, from those that it was trained on.")
    rows = ask(data.drift)
    if not rows:
        empty("Nothing to tell yet: distances are kept of micro-batches of 100 images and more.")
        return
    last = rows[-1]
    far = last["psi_max"]
    verdict = "changed" if far > charts.PSI_CHANGED else "look at it" if far > charts.PSI_WATCH else "as in training"
    cards(
        [
            (
                "Now",
                verdict,
                "By the population stability index of the farthest component: 0.1 look at it, 0.25 changed",
            ),
            ("PSI, farthest", f"{far:.3f}", "Of the projected components"),
            ("PSI, mean", f"{last['psi_mean']:.3f}", "Over the components"),
            ("Low confidence", percent(last["low_confidence"]), "Answers below 50 %, of the last micro-batch"),
            ("In training", percent(last["low_confidence_in_training"]), "The same share of the training images"),
        ]
    )
    with st.container(border=True):
        st.markdown("**Population stability index** with its customary limits, 0.1 and 0.25")
        st.altair_chart(charts.drift(rows, PSI, "PSI", thresholds=True), key="psi")
    left, right = st.columns(2)
    with left, st.container(border=True):
        st.markdown("**Mean shift**, in spreads of the training images")
        st.altair_chart(charts.drift(rows, {"mean_shift": "largest shift"}, "spreads"), key="shift")
    with right, st.container(border=True):
        st.markdown("**Low confidence**: share of answers below 50 %")
        st.altair_chart(charts.drift(rows, LOW, "share"), key="low")
