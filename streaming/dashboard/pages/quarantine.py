"""The page Quarantine: messages that could not be scored, the reasons, and replay."""

from typing import Any

import streamlit as st

from streaming.dashboard import charts, data
from streaming.dashboard.context import Dashboard
from streaming.dashboard.layout import ago, cards, empty, errors_shown, format_time, plain, run_query, title
from streaming.dashboard.pictures import picture
from streaming.jobs.replay import ReplayOptions, ReplayReport, replay
from streaming.platform.broker import bootstrap_servers
from streaming.wording import counted

ROWS = 50
SHOWN_BYTES = 256
HEX_WIDTH = 16
ANY = "all reasons"


def show(dashboard: Dashboard) -> None:
    """Draw the page."""
    title("Quarantine", "Messages that could not be scored. Their bytes are kept and can be published again.")
    found = run_query(data.reasons)
    if not found:
        empty("The quarantine is empty: every message so far has a prediction.")
        return
    total, replayed = sum(row["messages"] for row in found), sum(row["replayed"] for row in found)
    cards(
        [
            ("Quarantined", f"{total:,}", "Messages without a prediction"),
            ("Replayed", f"{replayed:,}", "Quarantined messages that were published again"),
            ("Reasons", f"{len(found)}", "Number of distinct reasons"),
            (
                "Last",
                ago(max(filter(None, (row["last"] for row in found)), default=None)),
                "Time of the newest message",
            ),
        ]
    )
    left, right = st.columns([1, 1.6])
    with left, st.container(border=True):
        st.markdown("**By reason**")
        st.altair_chart(charts.counts(found, "reason", "messages", "messages"), key="reasons")
    with right, st.container(border=True):
        _replay(dashboard, found)
    _rows(dashboard, found)


def _replay(dashboard: Dashboard, found: data.Rows) -> None:
    st.markdown("**Replay**")
    st.caption("Publishes the messages to their topic again, unchanged, and marks them as replayed.")
    reason = st.selectbox("Reason", [ANY, *(row["reason"] for row in found)], key="replayed_reason")
    waiting = sum(row["messages"] - row["replayed"] for row in found if reason in {ANY, row["reason"]})
    text = f"Replay {counted(waiting, 'message')}"
    if not dashboard.read_only and st.button(text, icon=":material/replay:", type="primary", disabled=not waiting):
        _confirm(dashboard, None if reason == ANY else reason, waiting)
    if result := st.session_state.pop("replayed", None):
        st.success(result, icon=":material/check:")


@st.dialog("Replay?")
def _confirm(dashboard: Dashboard, reason: str | None, waiting: int) -> None:
    st.write(
        f"{counted(waiting, 'message')}{f' quarantined as {plain(reason)}' if reason else ''} will be published again."
    )
    if st.button("Confirm replay", type="primary", icon=":material/replay:"):
        with errors_shown():
            bar = st.progress(0.0)

            def shown(report: ReplayReport) -> None:
                bar.progress(min(1.0, report.sent / max(1, report.wanted)))

            servers = bootstrap_servers(dashboard.settings)
            report = replay(dashboard.settings, servers, ReplayOptions(reason), shown)
            left = f"; stopped: {report.failed}" if report.failed else ""
            refused = f"; {report.refused:,} are larger than the broker accepts" if report.refused else ""
            st.session_state.replayed = f"Sent {report.sent:,} of {counted(report.wanted, 'message')}{refused}{left}."
            st.rerun()


def _rows(dashboard: Dashboard, found: data.Rows) -> None:
    chosen = st.pills("Show", [row["reason"] for row in found], key="shown_reason")
    rows = run_query(data.quarantined, chosen, limit=ROWS)
    st.caption(f"The newest {len(rows)} messages. Select a row for its details.")
    table = [
        {
            "when": row["quarantined_at"],
            "reason": row["reason"],
            "detail": row["detail"],
            "source": row["source"],
            "partition": row["partition"],
            "offset": row["offset"],
            "replayed": row["replayed_at"],
        }
        for row in rows
    ]
    event: Any = st.dataframe(
        table,
        hide_index=True,
        on_select="rerun",
        selection_mode="single-row",
        height=min(38 * (len(rows) + 1), 320),
        column_config={
            "when": st.column_config.DatetimeColumn(format="YYYY-MM-DD HH:mm:ss"),
            "replayed": st.column_config.DatetimeColumn(format="YYYY-MM-DD HH:mm:ss"),
            "detail": st.column_config.TextColumn(width="large"),
        },
    )
    picked = event.selection.rows
    if picked and picked[0] < len(rows):
        _show_message(dashboard, rows[picked[0]])
    elif rows:
        _show_message(dashboard, rows[0])


def _show_message(dashboard: Dashboard, row: dict[str, Any]) -> None:
    value = data.bad_bytes(dashboard.reader, row["topic"], row["partition"], row["offset"])
    with st.container(border=True):
        left, right = st.columns([1, 2])
        with left:
            st.markdown(f"**{plain(row['reason'])}** in stage {row['stage']}")
            st.markdown(plain(row["detail"]))
            st.caption(f"{plain(row['source'])}  \n{format_time(row['quarantined_at'])}  \n{len(value or b''):,} bytes")
        with right:
            made = picture(value, dashboard.settings.image_limits) if value else None
            if made is not None:
                st.image(made, caption="This image can be decoded now: a replay would score it.")
            elif value:
                st.code(as_hex(value[:SHOWN_BYTES]), language=None)
            else:
                st.caption("The message has no bytes.")


def as_hex(value: bytes) -> str:
    """Return a hex dump: offset, bytes in hex, and printable ASCII characters."""
    lines = []
    for first in range(0, len(value), HEX_WIDTH):
        part = value[first : first + HEX_WIDTH]
        text = "".join(chr(byte) if 32 <= byte < 127 else "·" for byte in part)  # noqa: PLR2004  printable ASCII
        lines.append(f"{first:04x}  {part.hex(' '):<{3 * HEX_WIDTH}} {text}")
    return "\n".join(lines)
