"""The page Predictions: filtered predictions with thumbnails, and a form to correct a label."""

from typing import Any

import streamlit as st

from streaming.dashboard import charts, data
from streaming.dashboard.actions import add_label
from streaming.dashboard.context import Dashboard
from streaming.dashboard.data import Filter
from streaming.dashboard.layout import (
    NOTHING,
    ago,
    empty,
    errors_shown,
    format_time,
    percent,
    picture_of,
    placeholder,
    plain,
    run_query,
    title,
)

COLUMNS, LINES = 8, 3
LABEL_CHARS = 14  # fit on one line of a card
JUDGED = {"all": None, "right": "right", "wrong": "wrong"}


def show(dashboard: Dashboard) -> None:
    """Draw the page."""
    title("Predictions", "Newest first. Open one to see the probabilities of other classes or to correct its label.")
    wanted = _filters()
    if wanted is None:
        empty("No predictions yet: publish images with `imagestream publish` and run `imagestream stream`.")
        return
    if st.session_state.get("wanted") != wanted:
        st.session_state.wanted, st.session_state.page = wanted, 0
    size = COLUMNS * LINES
    page = run_query(data.predictions, wanted, limit=size, skip=size * st.session_state.page)
    _pager(page.total, size)
    if not page.rows:
        empty("No prediction matches the filters.")
        return
    pictures = dashboard.pictures.of(map(picture_of, page.rows))
    for first in range(0, len(page.rows), COLUMNS):
        for column, row in zip(st.columns(COLUMNS), page.rows[first : first + COLUMNS], strict=False):
            with column, st.container(border=True):
                _card(dashboard, row, pictures.get(picture_of(row)))


def _filters() -> Filter | None:
    """Draw the filter widgets; None if there are no predictions."""
    labels, versions = run_query(data.choices)
    if not versions:
        return None
    columns = st.columns([2, 1.2, 2, 2, 1.6], vertical_alignment="bottom")
    chosen = columns[0].multiselect("Label", labels, placeholder="any")
    of_versions = columns[1].multiselect("Model version", versions, placeholder="any")
    least, most = columns[2].slider("Confidence", 0.0, 1.0, (0.0, 1.0), 0.01)
    source = columns[3].text_input("Source", placeholder="part of the name", max_chars=200)
    judged = columns[4].segmented_control("Correctness", list(JUDGED), default="all", required=True)
    return Filter(tuple(chosen), tuple(of_versions), (least, most), source.strip(), JUDGED[judged or "all"])


def _pager(total: int, size: int) -> None:
    pages = max(1, -(-total // size))
    st.session_state.page = min(st.session_state.page, pages - 1)

    def turn(by: int) -> None:
        st.session_state.page = min(max(0, st.session_state.page + by), pages - 1)

    with st.container(horizontal=True, vertical_alignment="center"):
        st.button(
            "Newer", icon=":material/chevron_left:", on_click=turn, args=(-1,), disabled=not st.session_state.page
        )
        last = st.session_state.page >= pages - 1
        st.button("Older", icon=":material/chevron_right:", on_click=turn, args=(1,), disabled=last)
        st.caption(f"page {st.session_state.page + 1:,} of {pages:,} · {total:,} predictions")


def _card(dashboard: Dashboard, row: dict[str, Any], picture: bytes | None) -> None:
    if picture is None:
        placeholder()
    else:
        st.image(picture, width="stretch")
    judged = "" if row["truth"] is None else " :green[✓]" if row["truth"] == row["label"] else " :red[✗]"
    label = row["label"] or ""
    st.markdown(f"**{plain(label if len(label) <= LABEL_CHARS else label[: LABEL_CHARS - 1] + '…')}**")
    st.caption(f"{percent(row['confidence'], 0)}{judged} · v{row['model_version']} · {ago(row['scored_at'])}")
    key = f"open-{row['topic']}-{row['partition']}-{row['offset']}"
    if st.button("Open", key=key, type="tertiary", icon=":material/open_in_full:"):
        _details(dashboard, row)


@st.dialog("Prediction", width="large")
def _details(dashboard: Dashboard, row: dict[str, Any]) -> None:
    with errors_shown():
        found = run_query(data.one_prediction, row["topic"], row["partition"], row["offset"])
        if found is None:
            empty("This row is no longer in the table.")
            return
        left, right = st.columns([1, 2])
        picture = dashboard.pictures.of([picture_of(row)]).get(picture_of(row))
        with left:
            if picture is None:
                placeholder("the image is no longer available")
            else:
                st.image(picture, width="stretch")
        with right:
            st.altair_chart(charts.probabilities(found["top_k"] or []), key="top")
            _lineage(found)
        _label_form(dashboard, row)


def _lineage(found: dict[str, Any]) -> None:
    facts = {
        "image": found["image_id"],
        "source": found["source"],
        "message": f"{found['topic']} / {found['partition']} / {found['offset']}",
        "published": format_time(found["published_at"]),
        "scored": format_time(found["scored_at"]),
        "model": f"version {found['model_version']}, batch {found['batch_id']}",
    }
    st.markdown("  \n".join(f":gray[{name}]  {plain(value)}" for name, value in facts.items()))


def _label_form(dashboard: Dashboard, row: dict[str, Any]) -> None:
    given = data.given_labels(dashboard.reader, [row["image_id"]]).get(row["image_id"], row["label_true"])
    st.markdown(f"True label: **{plain(given) if given else NOTHING}**")
    if dashboard.read_only:
        return
    labels, _ = run_query(data.choices)
    with st.form("label", border=False):
        left, right = st.columns([3, 1], vertical_alignment="bottom")
        label = left.selectbox("True label", labels, index=None, accept_new_options=True, placeholder="choose or type")
        if right.form_submit_button("Save label", type="primary", width="stretch") and label:
            add_label(dashboard.settings, row["image_id"], label)
            dashboard.reader.version("labels")
            st.success(f"Saved: {plain(label)}. The next retraining and report use it.", icon=":material/check:")
