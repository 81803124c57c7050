"""The script that Streamlit runs for every session and interaction; `imagestream dashboard` starts the server."""

from streaming.dashboard.frame import show

show()
