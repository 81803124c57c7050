"""A schema registry on loopback, with answers that the test chooses."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

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

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            registry.asked.append(self.path)
            status, body = answer(int(self.path.rsplit("/", 1)[1]))
            self.send_response(status)
            self.end_headers()
            with suppress(OSError):  # the other end has given up
                while drip is not None and not drip.wait(0.05):
                    self.wfile.write(b" ")
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        registry.url = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            yield registry
        finally:
            server.shutdown()
            thread.join()
