"""Upload: an image goes the way of all images, and its prediction appears."""

from time import monotonic, sleep

import streamlit as st

from streaming.dashboard import charts, data
from streaming.dashboard.actions import publish
from streaming.dashboard.context import Dashboard
from streaming.dashboard.layout import empty, percent, plain, seconds, title, told
from streaming.dashboard.pictures import Wanted, picture

TYPES = ["jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"]
WAIT_S = 60.0
POLL_S = 0.25


def show(dashboard: Dashboard) -> None:
    """Draw the page."""
    title("Upload", f"One image, published to the topic `{dashboard.settings.topic}` like any other.")
    if dashboard.read_only:
        empty("This dashboard is read-only: it publishes nothing.")
        return
    left, right = st.columns([1, 1.4], gap="large")
    with left, st.form("upload"):
        file = st.file_uploader("Image", type=TYPES)
        label = st.text_input("True label, if you know it", max_chars=200, placeholder="optional")
        sent = st.form_submit_button("Publish", type="primary", icon=":material/send:", width="stretch")
    with right, told():
        if sent and file is None:
            st.warning("Choose an image first.")
        elif sent and file is not None:
            _publish_and_wait(dashboard, file.getvalue(), file.name, label.strip())
        else:
            empty("The prediction will be here.")


def _publish_and_wait(dashboard: Dashboard, content: bytes, name: str, label: str) -> None:
    started = monotonic()
    with st.status("Publishing …", expanded=True) as status:
        wanted = publish(dashboard, content, name, label or None)
        dashboard.pictures.add(wanted, content)
        st.write(f"Acknowledged: partition {wanted.partition}, offset {wanted.offset}")
        status.update(label="Waiting for the stream …")
        while monotonic() - started < WAIT_S:
            if _has_row(dashboard, wanted):
                break
            sleep(POLL_S)
        waited_s = monotonic() - started
        status.update(label=f"Waited {seconds(waited_s)}", state="complete", expanded=False)
    if not _show_answer(dashboard, wanted, content, waited_s):
        st.warning(
            f"No row after {WAIT_S:.0f} s. The message is safe in Kafka, and answered once `imagestream stream` runs.",
            icon=":material/hourglass_empty:",
        )


def _has_row(dashboard: Dashboard, wanted: Wanted) -> bool:
    reader, place = dashboard.reader, (wanted.topic, wanted.partition, wanted.offset)
    reader.version("predictions", "quarantine", "batches")
    return bool(data.one_prediction(reader, *place) or data.one_quarantined(reader, *place))


def _show_answer(dashboard: Dashboard, wanted: Wanted, content: bytes, waited_s: float) -> bool:
    """Show what became of the message, if anything did."""
    reader, place = dashboard.reader, (wanted.topic, wanted.partition, wanted.offset)
    if row := data.one_prediction(reader, *place):
        image, text = st.columns([1, 2])
        if made := picture(content, dashboard.settings.image_limits):
            image.image(made, width="stretch")
        with text:
            st.subheader(f"{plain(row['label'])}  {percent(row['confidence'])}", anchor=False)
            st.caption(f"model version {row['model_version']} · {seconds(waited_s)} after the click")
            st.altair_chart(charts.probabilities(row["top_k"] or []), key="answer")
        return True
    if bad := data.one_quarantined(reader, *place):
        st.error(f"Quarantined: {plain(bad['reason'])}. {plain(bad['detail'])}", icon=":material/report:")
        return True
    return False
