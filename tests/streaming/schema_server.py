"""A schema registry on loopback, with answers that the test chooses."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from tests.http_server import QuietHandler, http_server

UNKNOWN = 404, json.dumps({"error_code": 40403, "message": "Schema not found"}).encode()

Answer = tuple[int, bytes]


@dataclass
class SchemaServer:
    """Where the registry is, and what it was asked for, in order."""

    url: str = ""
    asked: list[str] = field(default_factory=list)


def schema_answer(schema: object, **more: object) -> Answer:
    """A schema as a registry gives it."""
    return 200, json.dumps({"schema": json.dumps(schema), **more}).encode()


@contextmanager
def schema_server(answer: Callable[[int], Answer], *, drip: threading.Event | None = None) -> Iterator[SchemaServer]:
    """A server that runs for the block.

    Args:
        answer: id → status and body.
        drip: send a byte at a time, without an end before this is set.
    """
    registry = SchemaServer()

    class Handler(QuietHandler):
        def do_GET(self) -> None:  # noqa: N802  the name that http.server calls
            registry.asked.append(self.path)
            status, body = answer(int(self.path.rsplit("/", 1)[1]))
            self.send_response(status)
            self.end_headers()
            with suppress(OSError):  # the other end has given up
                while drip is not None and not drip.wait(0.05):
                    self.wfile.write(b" ")
                self.wfile.write(body)

    with http_server(Handler) as registry.url:
        yield registry
