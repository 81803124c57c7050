"""A schema registry on loopback that registers and looks up schemas, or responds as specified by the test."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from urllib.parse import unquote

from tests.http_server import QuietHandler, http_server

Answer = tuple[int, bytes]


def error_answer(status: int, code: int, message: str) -> Answer:
    """An error as a registry reports it."""
    return status, json.dumps({"error_code": code, "message": message}).encode()


UNKNOWN = error_answer(404, 40403, "Schema not found")


@dataclass
class SchemaServer:
    """The registry's URL, the requested paths in order, and the registered schemas.

    Attributes:
        subjects: subject → ids; an id is the position of a schema in `schemas`, from 1.
    """

    url: str = ""
    asked: list[str] = field(default_factory=list)
    schemas: list[str] = field(default_factory=list)
    subjects: dict[str, set[int]] = field(default_factory=dict)

    def fetch(self, number: int) -> Answer:
        """A registered schema."""
        known = 0 < number <= len(self.schemas)
        return (200, json.dumps({"schema": self.schemas[number - 1]}).encode()) if known else UNKNOWN

    def post(self, path: str, schema: str) -> Answer:
        """Look up a schema under a subject, or register it."""
        _, _, subject, *versions = map(unquote, path.split("/"))
        if versions:
            if schema not in self.schemas:
                self.schemas.append(schema)
            self.subjects.setdefault(subject, set()).add(self.schemas.index(schema) + 1)
        elif subject not in self.subjects:
            return error_answer(404, 40401, f"Subject '{subject}' not found.")
        found = [one for one in self.subjects[subject] if self.schemas[one - 1] == schema]
        return (200, json.dumps({"subject": subject, "id": found[0]}).encode()) if found else UNKNOWN


def schema_answer(schema: object, **more: object) -> Answer:
    """A schema as returned by a registry."""
    return 200, json.dumps({"schema": json.dumps(schema), **more}).encode()


@contextmanager
def schema_server(
    answer: Callable[[int], Answer] | None = None,
    *,
    post: Callable[[str, str], Answer] | None = None,
    drip: threading.Event | None = None,
) -> Iterator[SchemaServer]:
    """A server that runs for the block.

    Args:
        answer: id → status and body; default: the registered schemas.
        post: path and schema → status and body; default: look up or register.
        drip: send one byte at a time until this is set.
    """
    registry = SchemaServer()
    fetched, posted = answer or registry.fetch, post or registry.post

    class Handler(QuietHandler):
        def do_GET(self) -> None:  # noqa: N802  the name expected by http.server
            registry.asked.append(self.path)
            self._reply(*fetched(int(self.path.rsplit("/", 1)[1])))

        def do_POST(self) -> None:  # noqa: N802
            registry.asked.append(self.path)
            content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self._reply(*posted(self.path, content["schema"]))

        def _reply(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.end_headers()
            with suppress(OSError):  # the client has closed the connection
                while drip is not None and not drip.wait(0.05):
                    self.wfile.write(b" ")
                self.wfile.write(body)

    with http_server(Handler) as registry.url:
        yield registry
