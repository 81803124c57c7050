"""The operations behind the gateway's routes; those that block on disk or network run on a few threads."""

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, TypeVar

from deltalake.exceptions import DeltaError
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from producer.class_names import class_name
from producer.labelled_csv import Row
from producer.message import Delivery, Message, build_message
from streaming.errors import ConfigurationError, UnavailableError
from streaming.gateway.listing import ModelQuery, RowQuery, list_models, list_rows
from streaming.gateway.lookup import Found, Lookup, Rows
from streaming.gateway.problems import RETRY_AFTER_S, too_many
from streaming.gateway.schemas import Accepted, Labels, Models
from streaming.gateway.upload import (
    ENVELOPE_BYTES,
    MAX_BATCH_IMAGES,
    MemoryBudget,
    UploadLimits,
    check_label,
    check_source,
    declared_size,
    read_json,
    read_uploads,
)
from streaming.images.corrections import Labelled, add_label_rows
from streaming.images.labels_csv import collect
from streaming.settings import Settings

T = TypeVar("T")

SOURCE = "gateway"  # of images without a name
MEMORY_BYTES = 128 * 1024 * 1024  # for all uploads in progress
THREADS = 4  # for lookups, and the same number for sending
LOOKUPS_WAITING = 200
LABELS_WAITING = 8
MAX_LABELS_BYTES = 4 * 1024 * 1024  # of one request with labels
POLL_S = 0.3
READY_FRESH_S = 2.0


@dataclass(frozen=True)
class Broker:
    """The gateway's interface to Kafka.

    Attributes:
        max_image_bytes: the largest image that the topic accepts.
        send: sends a message; the future has its partition and offset, or an error.
        answers: whether the broker answers at the moment.
        timeout_s: how long to wait for an acknowledgement.
    """

    max_image_bytes: int
    send: Callable[[Message], "Future[Delivery]"]
    answers: Callable[[], bool]
    timeout_s: float


class Service:
    """Publishes to one topic, and reads the tables of one home."""

    def __init__(self, broker: Broker, settings: Settings) -> None:
        self._broker = broker
        self._settings = settings
        self._lookup = Lookup(settings.place)
        self._room = MemoryBudget(max(MEMORY_BYTES, broker.max_image_bytes + ENVELOPE_BYTES))
        self._lookups = ThreadPoolExecutor(THREADS, "lookup")
        self._waiting = 0
        self._sends = ThreadPoolExecutor(THREADS, "send")
        self._labels = ThreadPoolExecutor(1, "labels")
        self._labelling = 0
        self._ready = (0.0, False)
        self._asking = asyncio.Lock()

    def close(self) -> None:
        self._lookups.shutdown()
        self._sends.shutdown()
        self._labels.shutdown()
        self._lookup.close()

    async def publish(
        self, request: Request, label: str | None, source: str | None, traceparent: str | None
    ) -> Accepted:
        (accepted,) = await self._publish(
            request, UploadLimits(self._broker.max_image_bytes), label, source, traceparent
        )
        return accepted

    async def publish_several(self, request: Request, traceparent: str | None) -> list[Accepted]:
        limits = UploadLimits(self._broker.max_image_bytes, MAX_BATCH_IMAGES)
        return await self._publish(request, limits, None, None, traceparent)

    async def _publish(
        self, request: Request, limits: UploadLimits, label: str | None, source: str | None, traceparent: str | None
    ) -> list[Accepted]:
        """Publish all images of a request, or none if one of them is rejected."""
        async with self._room.take(declared_size(request, limits)):
            messages = [
                build_message(
                    upload.data,
                    check_source(source or upload.name) or SOURCE,
                    label=check_label(upload.label or label),
                    traceparent=traceparent,
                )
                for upload in await read_uploads(request, limits)
            ]
            deliveries = await self._deliver(messages)
        return [
            Accepted(image_id=message.key.decode(), **asdict(delivery))
            for message, delivery in zip(messages, deliveries, strict=True)
        ]

    async def _deliver(self, messages: Sequence[Message]) -> list[Delivery]:
        """Send messages, and return their partitions and offsets when all are acknowledged."""
        which = "the image" if len(messages) == 1 else f"all {len(messages)} images"
        try:
            async with asyncio.timeout(self._broker.timeout_s):
                run = asyncio.get_running_loop().run_in_executor
                answers = []
                for message in messages:
                    answers.append(asyncio.wrap_future(await run(self._sends, self._broker.send, message)))
                    answers[-1].add_done_callback(asyncio.Future.exception)  # retrieved even after the timeout
                await asyncio.wait(answers)
        except TimeoutError as error:
            raise UnavailableError(f"the broker did not acknowledge {which} in time: send it again") from error
        if any(answer.exception() is not None for answer in answers):
            raise UnavailableError(f"the broker did not acknowledge {which}: send it again")
        return [answer.result() for answer in answers]

    async def add_labels(self, request: Request) -> Labelled:
        """Append the labels of a request's body; requests are processed one at a time."""
        body = await read_json(request, MAX_LABELS_BYTES)
        try:
            labels = Labels.model_validate_json(body)
        except ValidationError as error:
            raise RequestValidationError([one | {"loc": ("body", *one["loc"])} for one in error.errors()]) from error
        rows = (Row(n, one.image, class_name(one.label)) for n, one in enumerate(labels.labels, start=1))
        if self._labelling >= LABELS_WAITING:
            raise too_many("too many requests with labels at once: try again", RETRY_AFTER_S)
        self._labelling += 1
        try:
            add = partial(add_label_rows, self._settings, collect(labels.key, rows), labels.by)
            return await asyncio.get_running_loop().run_in_executor(self._labels, add)
        except (OSError, DeltaError) as error:
            raise ConfigurationError(
                "the labels cannot be written: the gateway needs write access to the tables"
            ) from error
        finally:
            self._labelling -= 1

    async def find(self, image_id: str, wait_s: float) -> Found:
        until = time.monotonic() + wait_s
        found = await self._find_now(image_id, None)
        while not found and time.monotonic() < until:
            await asyncio.sleep(min(POLL_S, max(0.0, until - time.monotonic())))
            found = await self._find_now(image_id, found)
        return found

    async def _find_now(self, image_id: str, before: Found | None) -> Found:
        return await self._run_lookup(self._lookup.find, image_id, before)

    async def list_rows(self, wanted: RowQuery) -> tuple[Rows, str | None]:
        return await self._run_lookup(list_rows, self._lookup, wanted)

    async def list_models(self, wanted: ModelQuery) -> Models:
        return await self._run_lookup(list_models, self._settings.place, wanted)

    async def _run_lookup(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run a function that reads the home on a lookup thread; 429 if too many are waiting."""
        if self._waiting >= LOOKUPS_WAITING:
            raise too_many("too many lookups at once: try again")
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._lookups, function, *arguments)
        finally:
            self._waiting -= 1

    async def ready(self) -> bool:
        """Whether the broker answers; the result is cached for two seconds."""
        async with self._asking:
            asked, answer = self._ready
            if time.monotonic() - asked > READY_FRESH_S:
                answer = await asyncio.to_thread(self._broker.answers)
                self._ready = (time.monotonic(), answer)
            return answer
