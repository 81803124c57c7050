"""Navigation and style of the dashboard; runs for every session and interaction."""

from collections.abc import Callable

import streamlit as st
from PIL import Image, ImageDraw

from streaming.dashboard.context import Dashboard, served
from streaming.dashboard.layout import errors_shown
from streaming.dashboard.pages import drift, live, models, predictions, quarantine, upload
from streaming.dashboard.palette import BLUE, GREEN, VIOLET

# Less space above a page, and more visible cards, than Streamlit's defaults.
STYLE = """<style>
.block-container { padding-top: 4.2rem; padding-bottom: 3rem; max-width: 1500px }
[data-testid="stMetric"] { padding: .7rem .9rem; min-height: 6.4rem }
[data-testid="stMetricLabel"] p { font-size: .8rem; opacity: .75 }
[data-testid="stImage"] img { border-radius: .4rem; image-rendering: auto }
h2 { padding-bottom: .2rem } h3 { padding-top: .6rem }
[data-testid="stVerticalBlock"] { gap: .8rem }
</style>"""


def show() -> None:
    """Draw the dashboard."""
    st.set_page_config(page_title="imagestream", page_icon=_icon(), layout="wide")
    st.html(STYLE)
    with errors_shown():
        dashboard = served()
        pages = {
            "Live": (live.show, "monitoring"),
            "Predictions": (predictions.show, "photo_library"),
            "Upload": (upload.show, "upload"),
            "Quarantine": (quarantine.show, "report"),
            "Models": (models.show, "model_training"),
            "Drift": (drift.show, "moving"),
        }
        chosen = st.navigation(
            [
                st.Page(
                    _page(draw, dashboard, title),
                    title=title,
                    icon=f":material/{icon}:",
                    url_path=title.lower(),
                    default=title == "Live",
                )
                for title, (draw, icon) in pages.items()
            ],
            position="top",
        )
        chosen.run()


def _icon() -> Image.Image:
    """Draw the icon; Streamlit would fetch its own icons over the network."""
    icon = Image.new("RGBA", (64, 64))
    draw = ImageDraw.Draw(icon)
    for left, top, colour in ((4, 36, BLUE), (24, 20, VIOLET), (44, 4, GREEN)):
        draw.rounded_rectangle((left, top, left + 16, 60), 4, fill=colour)
    return icon


def _page(draw: Callable[[Dashboard], None], dashboard: Dashboard, title: str) -> Callable[[], None]:
    def run() -> None:
        with errors_shown():
            draw(dashboard)

    run.__name__ = title.lower()
    return run
