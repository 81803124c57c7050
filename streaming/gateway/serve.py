"""The gateway's server: uvicorn, which completes requests in progress before it stops."""

import socket

import uvicorn
from fastapi import FastAPI

from streaming.errors import ConfigurationError
from streaming.gateway.connections import MAX_CONNECTIONS, Connections, protocol_of
from streaming.json_log import log_to_stderr

GRACE_S = 30  # for requests in progress at shutdown
IDLE_S = 30  # after which an idle connection is closed


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 chooses a free one.

    Raises:
        ServiceError: the address cannot be used.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=1024)
    except OSError as error:
        raise ConfigurationError(
            f"cannot listen on {host}:{port}: {error.strerror or error}; choose another --port"
        ) from error


def make_server(app: FastAPI, *, access_log: bool = False, log_format: str = "text") -> uvicorn.Server:
    """A server whose `run(sockets=[…])` handles requests until SIGTERM or Ctrl-C, then completes those in progress."""
    log_to_stderr(log_format, "uvicorn", "uvicorn.access", "uvicorn.error")
    config = uvicorn.Config(
        app,
        log_level="info" if access_log else "warning",
        access_log=access_log,
        log_config=None,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=GRACE_S,
        timeout_keep_alive=IDLE_S,
        http=protocol_of(Connections()),
        ws="none",
        limit_concurrency=MAX_CONNECTIONS + 1,  # our own limit comes first, and closes idle connections
    )
    server = uvicorn.Server(config)
    app.state.ending = lambda: server.should_exit  # event streams check it and end
    return server
