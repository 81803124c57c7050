"""Colours that are legible on light and dark backgrounds, and Streamlit's theme options."""

from typing import Any

BLUE, ORANGE, GREEN, RED, VIOLET, CYAN, PINK, GRAY = (
    "#3b82f6",
    "#f59e0b",
    "#10b981",
    "#ef4444",
    "#8b5cf6",
    "#06b6d4",
    "#ec4899",
    "#94a3b8",
)
SERIES = [BLUE, ORANGE, GREEN, VIOLET, CYAN, PINK, RED, GRAY]
LIGHT = {
    "primaryColor": "#2563eb",
    "backgroundColor": "#ffffff",
    "secondaryBackgroundColor": "#f1f5f9",
    "textColor": "#0f172a",
    "borderColor": "#e2e8f0",
}
DARK = {
    "primaryColor": BLUE,
    "backgroundColor": "#0b1220",
    "secondaryBackgroundColor": "#172033",
    "textColor": "#e2e8f0",
    "borderColor": "#26324a",
}
COMMON = {
    "font": "sans-serif",  # included in Streamlit: nothing is fetched over the network
    "baseRadius": "0.6rem",
    "baseFontSize": 15,
    "metricValueFontSize": "1.6rem",
    "showWidgetBorder": True,
    "chartCategoricalColors": SERIES,
}


def theme() -> dict[str, Any]:
    """Return Streamlit's options for a light and a dark theme; the browser selects one."""
    options: dict[str, Any] = {f"theme.{name}": value for name, value in COMMON.items()}
    for scheme, colours in (("light", LIGHT), ("dark", DARK)):
        options |= {f"theme.{scheme}.{name}": value for name, value in colours.items()}
    return options
