"""Publishing files to Kafka: each becomes one acknowledged message, or is reported with the reason why not.

A file is read only when there is room for it, so memory is bounded regardless of the number and size of the files.
"""

import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from producer.message import DEFAULT_TOPIC, MAX_MESSAGE_BYTES, Delivery
from producer.rate_limiter import RateLimiter
from producer.read import Fetch, ReadOptions, Skipped, SkipReason, read
from producer.sender import CONNECT_TIMEOUT_S, PLAINTEXT, Sender
from producer.sources import LabelFrom, Sources, find_files

if TYPE_CHECKING:
    from models.bad_image import Limits


@dataclass(frozen=True, slots=True)
class Failed:
    """A file that was sent, but not acknowledged by the broker."""

    path: str
    reason: str


@dataclass(frozen=True, slots=True)
class Progress:
    """The progress of publishing.

    Attributes:
        done: files read, sent or not.
        total: all files; None if their number is not known in advance.
        sent: messages acknowledged so far.
        bytes: the size of their images.
    """

    done: int
    total: int | None
    sent: int
    bytes: int


@dataclass(frozen=True, slots=True)
class PublishSummary:
    """The outcome of publishing: sent + skipped + failed = found, unless a failure or Ctrl-C stopped it early.

    Attributes:
        topic: the topic.
        found: files that the paths named; if they were read from a stream, those read.
        sent: messages that the broker acknowledged.
        bytes: the size of their images.
        seconds: the time from the first file to the last acknowledgement.
        skipped: files that were not sent.
        failed: files whose delivery failed.
        interrupted: whether Ctrl-C stopped it.
    """

    topic: str
    found: int
    sent: int
    bytes: int
    seconds: float
    skipped: list[Skipped]
    failed: list[Failed]
    interrupted: bool = False

    @property
    def complete(self) -> bool:
        """Whether every file was sent, except those that an option asked to skip."""
        wanted = sum(skip.wanted for skip in self.skipped)
        return not self.failed and not self.interrupted and self.sent + wanted == self.found

    @property
    def images_per_second(self) -> float:
        return self.sent / self.seconds if self.seconds else 0.0

    @property
    def megabytes_per_second(self) -> float:
        return self.bytes / 1e6 / self.seconds if self.seconds else 0.0


def publish(
    paths: Iterable[str | os.PathLike[str]] | Sources,
    *,
    bootstrap_servers: str,
    client: Mapping[str, Any] = PLAINTEXT,
    topic: str = DEFAULT_TOPIC,
    label_from: LabelFrom | str = LabelFrom.NONE,
    only_images: bool = False,
    skip_too_large: bool = False,
    max_bytes: int = MAX_MESSAGE_BYTES,
    shrink_to: int | None = None,
    limits: "Limits | None" = None,
    rate: float | None = None,
    fetch: Fetch | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    connect_timeout_s: float = CONNECT_TIMEOUT_S,
) -> PublishSummary:
    """Send every regular file that `paths` name to `topic`, each as one message acknowledged by all replicas.

    Args:
        paths: files, folders and patterns, as in `producer.sources.find_files`; or `Sources`.
        bootstrap_servers: addresses of the brokers, `host:port,…`.
        client: kafka-python's security arguments; default: none, for a plaintext broker.
        topic: the topic, created with the broker's defaults if it does not exist.
        label_from: `parent` sends the name of a file's folder as its label.
        only_images: skip files that are not images by their first bytes.
        skip_too_large: count a file that is too large as skipped on purpose.
        max_bytes: the largest image to send, in bytes; the topic's limit applies if it is lower.
        shrink_to: the longest side in pixels; larger images are shrunk to it by `models.shrink.shrink`.
        limits: bounds on decoding images to shrink; default: `models.bad_image.DEFAULT_LIMITS`.
        fetch: reads files of `Sources` whose names are URIs: (URI, n) → at most n bytes.
        rate: the maximum rate in images per second, evenly spaced; default: no limit.
        on_progress: called after every file.
        connect_timeout_s: the time to wait for a broker, in seconds.

    Returns:
        The summary, which also reports a failed delivery or Ctrl-C: both stop reading files and wait for the messages
        in flight.

    Raises:
        PublishError: a path, the topic or the broker cannot be used; nothing was sent.
    """
    sources = paths if isinstance(paths, Sources) else find_files(paths, label_from)
    options = ReadOptions(only_images, skip_too_large, max_bytes, shrink_to, limits, fetch)
    limiter = RateLimiter(rate)
    skipped = [Skipped(name, SkipReason.UNREADABLE, reason) for name, reason in sources.unreadable]
    sender = Sender(bootstrap_servers, topic, connect_timeout_s=connect_timeout_s, client=client)
    outcomes = _Outcomes()
    done = len(skipped)
    interrupted = False
    begun = time.monotonic()
    try:
        for file in sources.files:
            if outcomes.failed:  # the broker is down or the topic rejects messages: the next file would fail too
                break
            message = read(file, options, sender.max_message_bytes)
            done += 1
            if isinstance(message, Skipped):
                skipped.append(message)
            else:
                limiter.wait()
                sender.send(message).add_done_callback(partial(outcomes.note, file.name, len(message.value)))
            if on_progress:
                on_progress(Progress(done, sources.total, outcomes.sent, outcomes.bytes))
    except KeyboardInterrupt:
        interrupted = True
    finally:
        sender.finish()
        seconds = time.monotonic() - begun
        sender.close()
    found = done if sources.total is None else sources.total
    return PublishSummary(topic, found, outcomes.sent, outcomes.bytes, seconds, skipped, outcomes.failed, interrupted)


class _Outcomes:
    """The outcomes of messages, counted on the sender's threads."""

    def __init__(self) -> None:
        self.sent = 0
        self.bytes = 0
        self.failed: list[Failed] = []
        self._lock = threading.Lock()

    def note(self, name: str, size: int, delivery: "Future[Delivery]") -> None:
        error = delivery.exception()
        with self._lock:
            if error is not None:
                self.failed.append(Failed(name, str(error)))
            else:
                self.sent += 1
                self.bytes += size
