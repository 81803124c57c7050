"""Serving the dashboard: Streamlit as an ASGI application in this process, behind the token wall where there is one."""

import logging
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import uvicorn

from producer.message import MAX_MESSAGE_BYTES
from streaming.dashboard.context import Dashboard, serve
from streaming.dashboard.palette import theme
from streaming.dashboard.visitors import Visitors
from streaming.dashboard.wall import TokenWall
from streaming.errors import UsageError
from streaming.gateway.access import is_loopback
from streaming.gateway.connections import Connections, protocol_of
from streaming.gateway.serve import listen
from streaming.signals import stop_signals

LOOPBACK_NAMES = ["localhost", "127.0.0.1", "::1"]
CLOSE_TIMEOUT_S = 3
# Whatever a config.toml of the user's says; https://docs.streamlit.io/develop/api-reference/configuration
OPTIONS: dict[str, Any] = {
    "browser.gatherUsageStats": False,
    "client.showErrorDetails": "none",
    "client.showErrorLinks": "false",
    "client.toolbarMode": "minimal",
    "global.developmentMode": False,
    "runner.magicEnabled": False,
    "server.enableCORS": True,  # a page of another origin cannot open the websocket
    "server.enableXsrfProtection": True,
    "server.enableStaticServing": False,
    "server.fileWatcherType": "none",
    "server.headless": True,
    "server.maxUploadSize": MAX_MESSAGE_BYTES // 1024**2,
    "server.runOnSave": False,
}


def run_dashboard(
    dashboard: Dashboard, script: Path, host: str, port: int, token: str | None, on_start: Callable[[str], None]
) -> None:
    """Serve until SIGINT or SIGTERM.

    Args:
        script: what Streamlit runs for every visitor.
        port: 0 takes a free one.
        token: what a browser has to show; needed where others than this machine can reach the dashboard.
        on_start: called with the address once it is bound.

    Raises:
        ServiceError: the token is missing, or the address is taken or not ours.
    """
    if token is None and not is_loopback(host):
        raise UsageError(
            f"{host} can be reached from other machines, so the dashboard wants a token there: write one into a file "
            "and name it with IMAGESTREAM_DASHBOARD_TOKEN_FILE, or take --host 127.0.0.1"
        )
    with listen(host, port) as listener, stop_signals():
        server = uvicorn.Server(
            uvicorn.Config(
                _application(script, host, token),
                log_level="warning",
                access_log=False,
                server_header=False,
                http=protocol_of(Connections()),
                ws_max_size=2 * MAX_MESSAGE_BYTES,
                timeout_graceful_shutdown=CLOSE_TIMEOUT_S,
            )
        )
        import_module("streaming.dashboard.charts")  # now, not while the first visitor waits
        serve(dashboard)
        shown = f"[{host}]" if ":" in host else host
        on_start(f"http://{shown}:{listener.getsockname()[1]}")
        server.run(sockets=[listener])


def _application(script: Path, host: str, token: str | None) -> Any:
    from starlette.middleware import Middleware
    from streamlit import App, config
    from streamlit.web.bootstrap import load_config_options

    # A name that leads here by way of another's DNS is not one of ours.
    hosts = LOOPBACK_NAMES if is_loopback(host) else []
    load_config_options(OPTIONS | theme() | {"server.address": host, "server.allowedHosts": hosts})
    config._server_mode = "starlette-app"
    logging.getLogger("streamlit").setLevel(logging.ERROR)
    walls = [Middleware(Visitors, max_bytes=MAX_MESSAGE_BYTES)]
    if token:
        walls.append(Middleware(TokenWall, token=token))
    return App(script, middleware=walls)
