"""The script that Streamlit runs for every visitor and every click; `imagestream dashboard` starts the server."""

from streaming.dashboard.frame import show

show()
