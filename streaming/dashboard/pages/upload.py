"""The page Upload: publish an image and wait for its prediction."""

from time import monotonic, sleep

import streamlit as st

from streaming.dashboard import charts, data
from streaming.dashboard.actions import publish
from streaming.dashboard.context import Dashboard
from streaming.dashboard.layout import empty, errors_shown, percent, plain, seconds, title
from streaming.dashboard.pictures import ImageRef, picture

TYPES = ["jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"]
WAIT_S = 60.0
POLL_S = 0.25


def show(dashboard: Dashboard) -> None:
    """Draw the page."""
    title("Upload", f"Publish an image to the topic `{dashboard.settings.topic}`.")
    if dashboard.read_only:
        empty("Publishing is disabled: this dashboard is read-only.")
        return
    left, right = st.columns([1, 1.4], gap="large")
    with left, st.form("upload"):
        file = st.file_uploader("Image", type=TYPES)
        label = st.text_input("True label", max_chars=200, placeholder="optional")
        sent = st.form_submit_button("Publish", type="primary", icon=":material/send:", width="stretch")
    with right, errors_shown():
        if sent and file is None:
            st.warning("Choose an image first.")
        elif sent and file is not None:
            _publish_and_wait(dashboard, file.getvalue(), file.name, label.strip())
        else:
            empty("The prediction appears here.")


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
            f"No prediction after {WAIT_S:.0f} s. The message is stored in Kafka and is scored when `imagestream "
            f"stream` runs.",
            icon=":material/hourglass_empty:",
        )


def _has_row(dashboard: Dashboard, wanted: ImageRef) -> bool:
    reader, place = dashboard.reader, (wanted.topic, wanted.partition, wanted.offset)
    reader.version("predictions", "quarantine", "batches")
    return bool(data.one_prediction(reader, *place) or data.one_quarantined(reader, *place))


def _show_answer(dashboard: Dashboard, wanted: ImageRef, content: bytes, waited_s: float) -> bool:
    """Draw the prediction of a message or the reason for its quarantine; return whether there is one."""
    reader, place = dashboard.reader, (wanted.topic, wanted.partition, wanted.offset)
    if row := data.one_prediction(reader, *place):
        image, text = st.columns([1, 2])
        if made := picture(content, dashboard.settings.image_limits):
            image.image(made, width="stretch")
        with text:
            st.subheader(f"{plain(row['label'])}  {percent(row['confidence'])}", anchor=False)
            st.caption(f"model version {row['model_version']} · {seconds(waited_s)} after publishing")
            st.altair_chart(charts.probabilities(row["top_k"] or []), key="answer")
        return True
    if bad := data.one_quarantined(reader, *place):
        st.error(f"Quarantined: {plain(bad['reason'])}. {plain(bad['detail'])}", icon=":material/report:")
        return True
    return False
