"""What the gateway does for a request: everything that waits for disks or the network happens on a few threads."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import Request

from producer.message import Delivery, Message, build_message
from streaming.errors import ServiceError
from streaming.gateway.answers import Accepted, Models
from streaming.gateway.lists import ModelQuery, RowQuery, list_models, list_rows
from streaming.gateway.lookup import Found, Lookup, Rows
from streaming.gateway.problems import too_many
from streaming.gateway.upload import ENVELOPE_BYTES, Room, check_label, check_source, declared_size, read_upload
from streaming.storage.home import Home

T = TypeVar("T")

SOURCE = "gateway"  # of images that come without a name
MEMORY_BYTES = 128 * 1024 * 1024  # of uploads at once
THREADS = 4  # for lookups, and as many for sending
LOOKUPS_WAITING = 200
POLL_S = 0.3
READY_FRESH_S = 2.0


@dataclass(frozen=True)
class Broker:
    """What the gateway needs of Kafka.

    Attributes:
        max_image_bytes: the largest image that the topic takes.
        send: hands a message over; where the broker put it, or an error.
        answers: whether the broker answers now.
        timeout_s: how long to wait for an acknowledgement.
    """

    max_image_bytes: int
    send: Callable[[Message], "Future[Delivery]"]
    answers: Callable[[], bool]
    timeout_s: float


class Service:
    """One topic to publish to, and the tables of one home to look into."""

    def __init__(self, broker: Broker, home: Home) -> None:
        self._broker = broker
        self._lookup = Lookup(home)
        self._home = home
        self._room = Room(max(MEMORY_BYTES, broker.max_image_bytes + ENVELOPE_BYTES))
        self._lookups = ThreadPoolExecutor(THREADS, "lookup")
        self._waiting = 0
        self._sends = ThreadPoolExecutor(THREADS, "send")
        self._ready = (0.0, False)
        self._asking = asyncio.Lock()

    def close(self) -> None:
        self._lookups.shutdown()
        self._sends.shutdown()
        self._lookup.close()

    async def publish(
        self, request: Request, label: str | None, source: str | None, traceparent: str | None
    ) -> Accepted:
        max_bytes = self._broker.max_image_bytes
        async with self._room.take(declared_size(request, max_bytes)):
            upload = await read_upload(request, max_bytes)
            label = check_label(upload.label or label)
            source = check_source(source or upload.name) or SOURCE
            message = build_message(upload.data, source, label=label, traceparent=traceparent)
            delivery = await self._deliver(message)
        return Accepted(
            image_id=message.key.decode(),
            topic=delivery.topic,
            partition=delivery.partition,
            offset=delivery.offset,
        )

    async def _deliver(self, message: Message) -> Delivery:
        try:
            async with asyncio.timeout(self._broker.timeout_s):
                sending = await asyncio.get_running_loop().run_in_executor(self._sends, self._broker.send, message)
                answer = asyncio.wrap_future(sending)
                answer.add_done_callback(asyncio.Future.exception)  # it may come when nobody waits for it any more
                await asyncio.wait([answer])
        except TimeoutError as error:
            raise ServiceError("the broker did not acknowledge the image in time: send it again") from error
        if answer.exception() is not None:
            raise ServiceError("the broker did not acknowledge the image: send it again")
        return answer.result()

    async def find(self, image_id: str, wait_s: float) -> Found:
        until = time.monotonic() + wait_s
        found = await self._find_now(image_id, None)
        while not found and time.monotonic() < until:
            await asyncio.sleep(min(POLL_S, max(0.0, until - time.monotonic())))
            found = await self._find_now(image_id, found)
        return found

    async def _find_now(self, image_id: str, before: Found | None) -> Found:
        return await self._look_up(self._lookup.find, image_id, before)

    async def list_rows(self, wanted: RowQuery) -> tuple[Rows, str | None]:
        return await self._look_up(list_rows, self._lookup, wanted)

    async def list_models(self, wanted: ModelQuery) -> Models:
        return await self._look_up(list_models, self._home, wanted)

    async def _look_up(self, function: Callable[..., T], *arguments: Any) -> T:
        """What a function that reads the home gives, on a thread of those for lookups; 429 if too many wait."""
        if self._waiting >= LOOKUPS_WAITING:
            raise too_many("too many lookups at once: try again")
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._lookups, function, *arguments)
        finally:
            self._waiting -= 1

    async def ready(self) -> bool:
        """Whether the broker answers; asked at most once in two seconds, however many want to know."""
        async with self._asking:
            asked, answer = self._ready
            if time.monotonic() - asked > READY_FRESH_S:
                answer = await asyncio.to_thread(self._broker.answers)
                self._ready = (time.monotonic(), answer)
            return answer
