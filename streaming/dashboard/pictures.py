"""Small pictures of images that the tables name by topic, partition and offset.

The tables hold no image, so the bytes come from Kafka, for as long as it keeps them, or from the file that was
published, if it is there and still the same. What is fetched is bounded: messages, bytes and time. The bytes are
hostile: they are decoded by `models.decode` with its limits, and only a picture made from the pixels is passed on.
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

SIDE = 224  # pixels of a picture
MAX_MESSAGES = 64
MAX_BYTES = 64 * 1024**2
MAX_SECONDS = 4.0
CONNECT_MS = 2_000
POLL_MS = 300
SILENCE_S = 15.0
KEPT = 2_000  # pictures, of some kilobytes each


@dataclass(frozen=True)
class Wanted:
    """An image by where it is in Kafka, its id, and the name that it was published under."""

    topic: str  # as the tables have it
    partition: int
    offset: int
    image_id: str
    source: str | None = None


class Pictures:
    """Makes small pictures, and keeps those that it made lately; threads may share one."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._limits = settings.image_limits
        self._lock = threading.Lock()
        self._kept: OrderedDict[Wanted, bytes] = OrderedDict()
        self._ask_again = 0.0  # not before, of a broker that did not answer

    def of(self, wanted: Iterable[Wanted]) -> dict[Wanted, bytes]:
        """A PNG of each image that is still to be had, and can be decoded."""
        with self._lock:  # one after another: a consumer each would be many
            wanted = list(wanted)[:MAX_MESSAGES]
            missing = [one for one in wanted if one not in self._kept]
            left: list[Wanted] = []
            for one in missing:
                pixels = thumbnail([one.source], one.image_id, limits=self._limits) if one.source else None
                if pixels is None:
                    left.append(one)
                else:
                    self._keep(one, _png(Image.fromarray(pixels)))
            for one, data in self._fetch(left):
                if (made := picture(data, self._limits)) is not None:
                    self._keep(one, made)
            return {one: self._kept[one] for one in wanted if one in self._kept}

    def add(self, wanted: Wanted, data: bytes) -> None:
        """Keep the picture of an image whose bytes are at hand."""
        if (made := picture(data, self._limits)) is not None:
            with self._lock:
                self._keep(wanted, made)

    def _keep(self, wanted: Wanted, made: bytes) -> None:
        self._kept[wanted] = made
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)

    def _fetch(self, wanted: list[Wanted]) -> Iterator[tuple[Wanted, bytes]]:
        from kafka.errors import KafkaError

        if monotonic() < self._ask_again:
            return
        try:
            for one, record in _records(self._settings, wanted):
                # A topic that was made again under its name has other messages at the same offsets. In old rows the key
                # was the image id.
                key = (record.key or b"").decode("utf-8", "replace")
                if one.image_id in {read_headers(record.headers).id, _sha256(record.value), key}:
                    yield one, record.value
        except (KafkaError, ServiceError, ValueError, OSError):
            self._ask_again = monotonic() + SILENCE_S  # there is no broker, or no topic: placeholders are shown


def picture(data: bytes, limits: Limits = DEFAULT_LIMITS) -> bytes | None:
    """A square PNG of an encoded image, or None if it cannot be decoded within the limits."""
    pixels = decode(data, (SIDE, SIDE), limits, "crop")
    return None if isinstance(pixels, BadImage) else _png(Image.fromarray(pixels))


def _records(settings: Settings, wanted: list[Wanted]) -> Iterator[tuple[Wanted, Any]]:
    """Kafka's records of those that it still has, until one of the bounds is reached."""
    from kafka import TopicPartition

    by_partition: dict[Any, dict[int, Wanted]] = {}
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
        max_partition_fetch_bytes=1024**2,  # a larger message comes alone
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
