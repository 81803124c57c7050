"""The page Live: throughput, latency, accuracy, quarantine and the serving model."""

from datetime import timedelta

import streamlit as st

from streaming.dashboard import charts, data
from streaming.dashboard.context import Dashboard
from streaming.dashboard.data import Window
from streaming.dashboard.layout import NOTHING, ago, cards, empty, errors_shown, panel, percent, plain, seconds, title
from streaming.pipeline.observe import read_state
from streaming.registry import CHAMPION, open_registry

SPANS = {
    "15 min": timedelta(minutes=15),
    "1 h": timedelta(hours=1),
    "24 h": timedelta(days=1),
    "7 days": timedelta(days=7),
    "90 days": timedelta(days=90),
}
EVERY_S = 3.0


def show(dashboard: Dashboard) -> None:
    """Draw the page; its charts are updated every few seconds."""
    title("Live", f"Topic `{dashboard.settings.topic}` · updated every {EVERY_S:.0f} s")
    chosen = st.segmented_control(
        "Time range", list(SPANS), default="15 min", label_visibility="collapsed", required=True
    )
    _moving(dashboard, SPANS[chosen or "15 min"])


@st.fragment(run_every=EVERY_S)
def _moving(dashboard: Dashboard, span: timedelta) -> None:
    with errors_shown():
        reader, window = dashboard.reader, Window.last(span)
        reader.version("predictions", "batches", "labels")
        last = data.last_batches(reader)
        _state(dashboard, last)
        if not last:
            empty("No predictions yet: publish images with `imagestream publish` and run `imagestream stream`.")
            return
        _cards(dashboard, window, last)
        _plots(dashboard, window)


def _state(dashboard: Dashboard, last: data.Rows) -> None:
    state = read_state(dashboard.settings)
    streaming, why = (False, "no stream has run on this machine") if state is None else state.health()
    with st.container(horizontal=True, vertical_alignment="center"):
        st.badge(
            "streaming" if streaming else plain(why),
            icon=":material/check_circle:" if streaming else ":material/pause_circle:",
            color="green" if streaming else "gray",
        )
        if last:
            st.caption(f"last micro-batch {ago(last[0]['committed_at'])}")
            if last[0]["refused"]:
                st.badge(f"refused: {plain(last[0]['refused'][:120])}", icon=":material/block:", color="red")


def _cards(dashboard: Dashboard, window: Window, last: data.Rows) -> None:
    lag = dashboard.lag.read()
    busy = sum(row["seconds"] or 0 for row in last)
    rate = sum(row["input_rows"] for row in last) / busy if busy else None
    waited = data.latency_in_all(dashboard.reader, window)
    judged = data.accuracy(dashboard.reader, window)
    labelled = sum(row["labelled"] for row in judged)
    right = sum(row["labelled"] * row["accuracy"] for row in judged) / labelled if labelled else None
    champion = open_registry(dashboard.settings.home).target(CHAMPION)
    answering = last[0]["version"]
    cards(
        [
            (
                "Throughput",
                NOTHING if rate is None else f"{rate:,.0f} /s",
                "Images per second in the last micro-batches",
            ),
            (
                "Lag",
                NOTHING if lag.messages is None else f"{lag.messages:,}",
                lag.trouble or "Messages of the topic without a row",
            ),
            ("Latency, median", seconds(waited["p50"]), "From publishing to the committed row"),
            ("Latency, p95", seconds(waited["p95"]), "95% of the images are faster"),
            ("Accuracy", percent(right), f"On {labelled:,} labelled predictions"),
            (
                "Model",
                f"v{answering}" if champion in {None, answering} else f"v{answering} → v{champion}",
                "Version of the last micro-batch; after the arrow, the new champion used from the next one",
            ),
        ]
    )


def _plots(dashboard: Dashboard, window: Window) -> None:
    reader = dashboard.reader
    came = data.throughput(reader, window)
    if not came:
        empty("No micro-batch in this time range: choose a longer one above.")
        return
    left, right = st.columns(2)
    with left, st.container(border=True):
        st.markdown("**Throughput** by model version")
        swaps = data.swaps(reader, window)
        st.altair_chart(charts.throughput(came, window, swaps), key="throughput")
        if swaps:
            st.caption(f"Last change: version {swaps[0]['before']} → {swaps[0]['version']}, {ago(swaps[0]['moment'])}")
    with right:
        waited = data.latency(reader, window)
        chart = charts.latency(waited, window) if waited else None
        panel("**Latency** from publishing to the committed row", chart, "latency", "No message has a publishing time.")
    left, right = st.columns(2)
    with left:
        judged = data.accuracy(reader, window)
        chart = charts.accuracy(judged, window) if judged else None
        unlabelled = "No labels yet: publish images with labels, or add labels on the page Predictions."
        panel("**Accuracy** on labelled images", chart, "accuracy", unlabelled)
    with right:
        some = any(row["quarantined"] for row in came)
        chart = charts.per_step(came, window, "quarantined", "messages") if some else None
        panel("**Quarantined** messages", chart, "quarantined", "None in this time range.")
