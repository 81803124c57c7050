"""Elements shared by all pages: cards, empty states, one-line errors and value formats."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, TypeVar

import streamlit as st

from models.errors import ModelError
from streaming.dashboard.context import served
from streaming.dashboard.pictures import ImageRef
from streaming.errors import ServiceError

T = TypeVar("T")
NOTHING = "–"
PLACEHOLDER = ":material/image_not_supported:"


@contextmanager
def errors_shown() -> Iterator[None]:
    """Show an expected error of the block as a message on the page."""
    try:
        yield
    except (ServiceError, ModelError) as error:
        st.error(plain(str(error)), icon=":material/error:")  # may contain untrusted names


def title(text: str, caption: str) -> None:
    """Draw the title of a page."""
    st.header(text, anchor=False)
    st.caption(caption)


def empty(text: str) -> None:
    """Draw the empty state of a page or a part of it."""
    with st.container(border=True):
        st.markdown(f":material/hourglass_empty: {text}")


@st.cache_data(max_entries=300, show_spinner=False)
def _cached_query(_question: Callable[..., Any], name: str, version: Any, arguments: Any, named: Any) -> Any:  # noqa: ARG001
    return _question(served().reader, *arguments, **dict(named))


def run_query(question: Callable[..., T], *arguments: Any, **named: Any) -> T:
    """Run a query of `streaming.dashboard.data`; the result is cached until a table has a new version."""
    version = served().reader.version("predictions", "batches", "labels", "quarantine", "shadow")
    answer: T = _cached_query(question, question.__name__, version, arguments, sorted(named.items()))
    return answer


def cards(values: Sequence[tuple[str, str, str]]) -> None:
    """Draw a row of metrics (label, value, help)."""
    for column, (label, value, why) in zip(st.columns(len(values)), values, strict=True):
        column.metric(label, value, help=why, border=True)


def panel(text: str, chart: Any, key: str, otherwise: str = "") -> None:
    """Draw a chart with a border and a title, or a note if the chart is None."""
    with st.container(border=True):
        st.markdown(text)
        if chart is None:
            st.caption(otherwise)
        else:
            st.altair_chart(chart, key=key)


def picture_of(row: dict[str, Any]) -> ImageRef:
    """Return a reference to the image of a prediction or of a quarantined message."""
    return ImageRef(row["topic"], row["partition"], row["offset"], row["image_id"], row["source"])


def placeholder(why: str = "no longer available") -> None:
    """Draw a placeholder for a picture."""
    st.markdown(f"{PLACEHOLDER} :small[:gray[{why}]]")


def percent(share: float | None, digits: int = 1) -> str:
    return NOTHING if share is None else f"{share:.{digits}%}"


def seconds(value: float | None) -> str:
    if value is None:
        return NOTHING
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.1f} s" if value < 100 else f"{value / 60:,.0f} min"  # noqa: PLR2004


def ago(moment: datetime | None) -> str:
    """Format the time since a moment in its largest unit."""
    if moment is None:
        return NOTHING
    passed = max(0.0, (datetime.now(UTC) - moment).total_seconds())
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if passed >= size:
            return f"{passed / size:.0f} {unit} ago"
    return f"{passed:.0f} s ago"


def format_time(at: datetime | None) -> str:
    return NOTHING if at is None else f"{at:%Y-%m-%d %H:%M:%S} UTC"


def plain(text: str | None) -> str:
    """Escape untrusted text for Markdown."""
    if not text:
        return NOTHING
    shown = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)
    return "".join(f"\\{character}" if character in "\\`*_{}[]()<>#+-.!|~:$&@^=" else character for character in shown)
