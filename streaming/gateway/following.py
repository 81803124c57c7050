"""Predictions as they are made, over HTTP.

GET  /v1/predictions/stream    each prediction as a server-sent event; a client continues after its last event
POST …/images?wait=5           200 with the prediction itself, or the usual 202 after this time

Source of the event format: html.spec.whatwg.org, "Server-sent events".
"""

import asyncio
import json
import re
import threading
import time
from collections.abc import AsyncIterator, Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from typing import Annotated, Any
from urllib.parse import parse_qs

from fastapi import FastAPI, Header, HTTPException, Query, Request
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from streaming.errors import ServiceError
from streaming.follow import LATEST, Answer, Idle, follow_settings
from streaming.gateway import schemas
from streaming.gateway.lookup import Found, Lookup
from streaming.pipeline.positions import name_in_kafka
from streaming.settings import Settings

EVENT_STREAM = "text/event-stream"
MAX_STREAMS = 32
EVENTS_AT_A_TIME = 100
HEARTBEAT_S = 10.0
RETRY_MS = 2_000  # after which a browser reconnects
MAX_POSITION_CHARS = 8_000

UPLOADS = ("/images", "/v1/images")
MAX_WAITING = 200  # maximum number of uploads that wait; further ones get their 202 at once
MAX_WAIT_S = 30.0
POLL_S = 0.25
THREADS = 4

PositionParameter = Annotated[
    str, Query(max_length=MAX_POSITION_CHARS, description="latest, earliest, or the id of the event to continue after")
]
LastEventHeader = Annotated[
    str | None, Header(max_length=MAX_POSITION_CHARS, description="the id of the event to continue after")
]


def add_following(app: FastAPI, settings: Settings, dependencies: list[Any]) -> None:
    """Add both to the gateway's application, before its routes of single predictions are added.

    Args:
        dependencies: of the route, such as the check of the API key.
    """
    _add_stream(app, settings, dependencies)
    app.add_middleware(AnswerUploads, lookup=Lookup(settings.place))
    described = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            for path in UPLOADS:
                if operation := described()["paths"].get(path, {}).get("post"):
                    answered = {"description": "its prediction, with `wait`", "content": {"application/json": {}}}
                    operation["responses"]["200"] = answered
                    operation.setdefault("parameters", []).append(wait_parameter())
        return described()

    app.openapi = openapi  # type: ignore[method-assign]


def wait_parameter() -> dict[str, Any]:
    """The parameter `wait` of an upload, in OpenAPI."""
    return {
        "name": "wait",
        "in": "query",
        "required": False,
        "schema": {"type": "number", "minimum": 0, "maximum": MAX_WAIT_S, "default": 0},
        "description": "seconds to wait for the prediction, which is then the response",
    }


def _add_stream(app: FastAPI, settings: Settings, dependencies: list[Any]) -> None:
    threads = ThreadPoolExecutor(MAX_STREAMS, "follow")
    room = asyncio.Semaphore(MAX_STREAMS)

    @app.get(
        "/v1/predictions/stream",
        dependencies=dependencies,
        response_class=StreamingResponse,
        responses={
            200: {"content": {EVENT_STREAM: {"schema": {"type": "string"}}}},
            **{code: {"description": HTTPStatus(code).phrase} for code in (401, 403, 404, 409, 422, 429, 503)},
        },
    )
    async def stream(request: Request, after: PositionParameter = LATEST, last_event_id: LastEventHeader = None) -> Any:
        """Each prediction as an event `prediction` when it is made; its data is the JSON of an answer.

        A client that reconnects with the header `Last-Event-ID`, as browsers do, receives the predictions after that
        event, none twice. An event `error` ends the stream if the tables or the broker cannot be read.
        """
        if room.locked():
            raise HTTPException(429, f"{MAX_STREAMS} clients follow the predictions: try again", {"Retry-After": "5"})
        await room.acquire()
        try:
            following = _Following(settings, last_event_id or after, threads)
            first = await following.next()
        except BaseException:
            room.release()
            raise
        events = _events(request, following, first, room.release)
        return StreamingResponse(events, media_type=EVENT_STREAM, headers={"Cache-Control": "no-store"})


class _Following:
    """Answers that are read on the threads of a pool, one call at a time.

    Attributes:
        position: where to continue after what was read.
    """

    def __init__(self, settings: Settings, after: str, threads: ThreadPoolExecutor) -> None:
        self.position = after
        self._answers: Generator[Answer | Idle, None, None] = follow_settings(settings, after)
        self._threads = threads
        self._reading = threading.Lock()

    async def next(self) -> list[Answer]:
        """The next answers; empty if there are none for half a second."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._read)

    def close(self) -> None:
        """Close it once no call is running."""
        self._threads.submit(self._close)

    def _read(self) -> list[Answer]:
        found: list[Answer] = []
        with self._reading:
            for answer in self._answers:
                self.position = answer.position
                if isinstance(answer, Idle):
                    break
                found.append(answer)
                if len(found) == EVENTS_AT_A_TIME:
                    break
        return found

    def _close(self) -> None:
        with self._reading:
            self._answers.close()


async def _events(
    request: Request, following: _Following, found: list[Answer], release: Callable[[], None]
) -> AsyncIterator[str]:
    ending: Callable[[], bool] = getattr(request.app.state, "ending", lambda: False)
    sent = time.monotonic()
    try:
        # With an id before the first event, a client that is cut off before it does not miss it either.
        begin = "" if found else f"id: {following.position}\n"
        yield f"retry: {RETRY_MS}\n{begin}\n"
        while not ending():
            if found:
                yield "".join(map(_event, found))
                sent = time.monotonic()
            elif time.monotonic() - sent > HEARTBEAT_S:
                yield ":\n\n"  # a comment, which keeps proxies from closing the connection
                sent = time.monotonic()
            found = await following.next()
    except ServiceError as error:
        yield f"event: error\ndata: {json.dumps({'detail': str(error)})}\n\n"
    finally:
        release()
        following.close()


def _event(answer: Answer) -> str:
    """An answer as an event, regardless of its bytes: anyone who may write to the topic can have sent it."""
    lines = re.split(
        "\r\n|\r|\n", answer.value.decode(errors="replace")
    )  # as the format defines lines, unlike splitlines
    data = "".join(f"data: {line}\n" for line in lines)
    return f"id: {answer.position}\nevent: prediction\n{data}\n"


class AnswerUploads:
    """ASGI middleware: an upload with `wait` is answered with its prediction, if that comes in time."""

    def __init__(self, app: ASGIApp, lookup: Lookup) -> None:
        self._app = app
        self._lookup = lookup
        self._lookups = ThreadPoolExecutor(THREADS, "wait")
        self._waiting = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As defined by ASGI."""
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] not in UPLOADS:
            await self._app(scope, receive, send)
            return
        given = parse_qs(scope["query_string"].decode("latin-1"), max_num_fields=100).get("wait", ["0"])[-1]
        try:
            wait_s = float(given)
        except ValueError:
            wait_s = -1
        if not 0 <= wait_s <= MAX_WAIT_S:
            detail = f"wait: expected seconds from 0 to {MAX_WAIT_S:g}, got {given[:100]!r}"
            refuse = scope["app"].exception_handlers[StarletteHTTPException]  # as the routes do
            refusal = await refuse(Request(scope), HTTPException(422, detail))
            await refusal(scope, receive, send)
            return
        if wait_s == 0 or self._waiting >= MAX_WAITING:
            await self._app(scope, receive, send)
            return
        accepted: list[Message] = []

        async def hold(message: Message) -> None:
            """Hold back a 202 response, and pass on all others."""
            if accepted or (message["type"] == "http.response.start" and message["status"] == HTTPStatus.ACCEPTED):
                accepted.append(message)
            else:
                await send(message)

        self._waiting += 1
        try:
            await self._app(scope, receive, hold)
            if not accepted:
                return
            body = json.loads(b"".join(message.get("body", b"") for message in accepted[1:]))
            answer = await self._answer(schemas.Accepted.model_validate(body), wait_s)
        finally:
            self._waiting -= 1
        if answer is not None:
            await JSONResponse(answer.model_dump(mode="json"))(scope, receive, send)
            return
        for message in accepted:
            await send(message)

    async def _answer(self, accepted: schemas.Accepted, wait_s: float) -> schemas.Answer | None:
        """The row of the message; None if there is none in time, or the tables cannot be read."""
        until = time.monotonic() + wait_s
        found: Found | None = None
        while time.monotonic() < until:
            try:
                found = await asyncio.get_running_loop().run_in_executor(
                    self._lookups, self._lookup.find, accepted.image_id, found
                )
            except ServiceError:
                return None
            rows = {table: [row for row in some if _is_of(row, accepted)] for table, some in found.rows.items()}
            predictions, quarantined = rows["predictions"], rows["quarantine"]
            if predictions or quarantined:
                return schemas.Answer.model_validate(
                    {
                        "image_id": accepted.image_id,
                        "status": "predicted" if predictions else "quarantined",
                        "predictions": predictions,
                        "quarantined": quarantined,
                    }
                )
            await asyncio.sleep(min(POLL_S, max(0.0, until - time.monotonic())))
        return None


def _is_of(row: dict[str, Any], accepted: schemas.Accepted) -> bool:
    """Whether a row is that of this message, and not of an earlier one with the same image."""
    place = (name_in_kafka(row["topic"]), row["partition"], row["offset"])
    return place == (accepted.topic, accepted.partition, accepted.offset)
