"""Serves the dashboard: Streamlit as an ASGI application in this process, behind token authentication if configured."""

import logging
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import uvicorn

from producer.message import MAX_MESSAGE_BYTES
from streaming.dashboard.auth import TokenAuth
from streaming.dashboard.context import Dashboard, serve
from streaming.dashboard.limits import ConnectionLimits
from streaming.dashboard.palette import theme
from streaming.errors import UsageError
from streaming.gateway.access import is_loopback
from streaming.gateway.connections import Connections, protocol_of
from streaming.gateway.serve import listen
from streaming.signals import stop_signals

LOOPBACK_NAMES = ["localhost", "127.0.0.1", "::1"]
CLOSE_TIMEOUT_S = 3
# Override the user's config.toml; https://docs.streamlit.io/develop/api-reference/configuration
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
        dashboard: the state shared by the pages.
        script: the script that Streamlit runs for every session.
        port: port to listen on; 0 for any free port.
        token: token that a browser must present; required unless `host` is loopback.
        on_start: called with the URL once the port is bound.

    Raises:
        ServiceError: the token is missing, or the address cannot be bound.
    """
    if token is None and not is_loopback(host):
        raise UsageError(
            f"{host} can be reached from other machines, so the dashboard requires a token: write one to a file and "
            "set IMAGESTREAM_DASHBOARD_TOKEN_FILE to it, or use --host 127.0.0.1"
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
        import_module("streaming.dashboard.charts")  # slow: not during the first request
        serve(dashboard)
        shown = f"[{host}]" if ":" in host else host
        on_start(f"http://{shown}:{listener.getsockname()[1]}")
        server.run(sockets=[listener])


def _application(script: Path, host: str, token: str | None) -> Any:
    from starlette.middleware import Middleware
    from streamlit import App, config
    from streamlit.web.bootstrap import load_config_options

    # Reject other host names, as protection against DNS rebinding.
    hosts = LOOPBACK_NAMES if is_loopback(host) else []
    load_config_options(OPTIONS | theme() | {"server.address": host, "server.allowedHosts": hosts})
    _run_as_application(config)
    logging.getLogger("streamlit").setLevel(logging.ERROR)
    middleware = [Middleware(ConnectionLimits, max_bytes=MAX_MESSAGE_BYTES)]
    if token:
        middleware.append(Middleware(TokenAuth, token=token))
    return App(script, middleware=middleware)


def _run_as_application(config: Any) -> None:
    """Select Streamlit's ASGI mode, which only `streamlit run` sets by a public interface."""
    config._server_mode = "starlette-app"
