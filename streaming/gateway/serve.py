"""The gateway as a process: uvicorn, which finishes the uploads under way when it is told to stop."""

import socket

import uvicorn
from fastapi import FastAPI

from streaming.errors import ConfigurationError
from streaming.gateway.connections import MAX_CONNECTIONS, Connections, protocol_of
from streaming.json_log import logging_config

GRACE_S = 30  # for what is under way
IDLE_S = 30  # a connection without a request is closed


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 takes a free one.

    Raises:
        ServiceError: the address cannot be taken.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=1024)
    except OSError as error:
        raise ConfigurationError(
            f"cannot listen on {host}:{port}: {error.strerror or error}; choose another --port"
        ) from error


def make_server(app: FastAPI, *, access_log: bool = False, log_format: str = "text") -> uvicorn.Server:
    """A server whose `run(sockets=[…])` answers requests until SIGTERM or Ctrl-C, then finishes those under way."""
    config = uvicorn.Config(
        app,
        log_level="info" if access_log else "warning",
        access_log=access_log,
        log_config=logging_config(log_format, "uvicorn"),
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=GRACE_S,
        timeout_keep_alive=IDLE_S,
        http=protocol_of(Connections()),
        ws="none",
        limit_concurrency=MAX_CONNECTIONS + 1,  # our own bound comes first, and closes silent ones
    )
    server = uvicorn.Server(config)
    app.state.ending = lambda: server.should_exit  # event streams end by themselves then
    return server
