"""Thumbnails of images that the tables reference by topic, partition and offset.

The tables contain no images, so the bytes are read from Kafka until its retention has passed, or from the published
file if it is unchanged. Messages, bytes and time per request are bounded. The bytes are untrusted: they are decoded by
`models.decode` within its limits, and only a PNG made from the pixels reaches the browser.
"""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from time import monotonic
from typing import TYPE_CHECKING, Any

from PIL import Image

from models.decode import DEFAULT_LIMITS, BadImage, Limits, decode
from producer.message import read_headers
from streaming.errors import ServiceError
from streaming.pipeline.positions import name_in_kafka
from streaming.platform.broker import bootstrap_servers
from streaming.platform.kafka_client import connect
from streaming.platform.kafka_security import client_arguments
from streaming.reports.thumbnails import thumbnail
from streaming.settings import Settings

if TYPE_CHECKING:
    from kafka import KafkaConsumer

SIDE = 224  # side length of a picture in pixels
MAX_MESSAGES = 64
MAX_BYTES = 64 * 1024**2
MAX_SECONDS = 4.0
CONNECT_MS = 2_000
POLL_MS = 300
BROKER_RETRY_S = 15.0
KEPT = 2_000  # number of cached pictures, of some kilobytes each


@dataclass(frozen=True)
class ImageRef:
    """A reference to an image: its position in Kafka, its id and the name that it was published under."""

    topic: str  # as in the tables
    partition: int
    offset: int
    image_id: str
    source: str | None = None


class Pictures:
    """Creates thumbnails and caches the most recent ones; thread-safe."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._limits = settings.image_limits
        self._lock = threading.Lock()
        self._kept: OrderedDict[ImageRef, bytes] = OrderedDict()
        self._retry_at = 0.0  # time before which an unreachable broker is not contacted again

    def of(self, wanted: Iterable[ImageRef]) -> dict[ImageRef, bytes]:
        """Return a PNG of each image that is still available and can be decoded."""
        with self._lock:  # one consumer at a time
            wanted = list(wanted)[:MAX_MESSAGES]
            missing = [one for one in wanted if one not in self._kept]
            left: list[ImageRef] = []
            for one in missing:
                pixels = thumbnail([one.source], one.image_id, limits=self._limits) if one.source else None
                if pixels is None:
                    left.append(one)
                else:
                    self._cache_picture(one, _png(Image.fromarray(pixels)))
            for one, data in self._fetch(left):
                if (made := picture(data, self._limits)) is not None:
                    self._cache_picture(one, made)
            return {one: self._kept[one] for one in wanted if one in self._kept}

    def add(self, wanted: ImageRef, data: bytes) -> None:
        """Cache the picture of an image whose bytes are given."""
        if (made := picture(data, self._limits)) is not None:
            with self._lock:
                self._cache_picture(wanted, made)

    def _cache_picture(self, wanted: ImageRef, made: bytes) -> None:
        self._kept[wanted] = made
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)

    def _fetch(self, wanted: list[ImageRef]) -> Iterator[tuple[ImageRef, bytes]]:
        from kafka.errors import KafkaError

        if monotonic() < self._retry_at:
            return
        try:
            for one, record in _records(self._settings, wanted):
                # A recreated topic has other messages at the same offsets. In old rows the key was the image id.
                key = (record.key or b"").decode("utf-8", "replace")
                if one.image_id in {read_headers(record.headers).id, _sha256(record.value), key}:
                    yield one, record.value
        except (KafkaError, ServiceError, ValueError, OSError):
            self._retry_at = monotonic() + BROKER_RETRY_S  # no broker or no topic: placeholders are shown


def picture(data: bytes, limits: Limits = DEFAULT_LIMITS) -> bytes | None:
    """Return a square PNG of an encoded image, or None if it cannot be decoded within the limits."""
    pixels = decode(data, (SIDE, SIDE), limits, "crop")
    return None if isinstance(pixels, BadImage) else _png(Image.fromarray(pixels))


def _records(settings: Settings, wanted: list[ImageRef]) -> Iterator[tuple[ImageRef, Any]]:
    """Yield the records that Kafka still has, until one of the bounds is reached."""
    from kafka import TopicPartition

    by_partition: dict[Any, dict[int, ImageRef]] = {}
    for one in wanted:
        by_partition.setdefault(TopicPartition(name_in_kafka(one.topic), one.partition), {})[one.offset] = one
    if not by_partition:
        return
    give_up, budget = monotonic() + MAX_SECONDS, MAX_BYTES
    with _consumer(settings) as consumer:
        consumer.assign(list(by_partition))
        begins = consumer.beginning_offsets(list(by_partition), timeout_ms=CONNECT_MS)
        ends = consumer.end_offsets(list(by_partition), timeout_ms=CONNECT_MS)
        for place, offsets in by_partition.items():
            left = sorted(offset for offset in offsets if begins[place] <= offset < ends[place])
            consumer.pause(*by_partition)
            consumer.resume(place)
            while left and budget > 0 and monotonic() < give_up:
                if not left[0] - 1 <= consumer.position(place, timeout_ms=CONNECT_MS) <= left[0]:
                    consumer.seek(place, left[0])
                records = consumer.poll(timeout_ms=POLL_MS, max_records=1).get(place, [])
                for record in records:
                    budget -= len(record.value or b"")
                    if record.offset in left and record.value:
                        yield offsets[record.offset], record
                    left = [offset for offset in left if offset > record.offset]


@contextmanager
def _consumer(settings: Settings) -> Iterator["KafkaConsumer"]:
    from kafka import KafkaConsumer

    consumer = connect(
        KafkaConsumer,
        bootstrap_servers=bootstrap_servers(settings),
        client_id="imagestream-dashboard",
        group_id=None,
        enable_auto_commit=False,
        allow_auto_create_topics=False,
        max_partition_fetch_bytes=1024**2,  # a larger message is fetched alone
        bootstrap_timeout_ms=CONNECT_MS,
        request_timeout_ms=CONNECT_MS,
        metrics_enabled=False,
        **client_arguments(settings),
    )
    try:
        yield consumer
    finally:
        consumer.close(autocommit=False)


def _png(image: Image.Image) -> bytes:
    file = BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _sha256(data: bytes | None) -> str:
    return hashlib.sha256(data or b"").hexdigest()
