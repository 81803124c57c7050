"""Sending files to Kafka: each file becomes one acknowledged message, or a name and a reason why not.

A file is read only when there is room for it, so memory does not grow with the number of files, nor with their size.
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
from producer.pace import Pace
from producer.read import Fetch, Reading, Reason, Skipped, read
from producer.sender import CONNECT_TIMEOUT_S, OPEN, Sender
from producer.sources import LabelFrom, Sources, find_files

if TYPE_CHECKING:
    from models.bad_image import Limits


@dataclass(frozen=True, slots=True)
class Failed:
    """A file that was sent, but whose delivery the broker did not acknowledge."""

    path: str
    reason: str


@dataclass(frozen=True, slots=True)
class Progress:
    """How far publishing is: files dealt with and in all, messages acknowledged and their bytes.

    The files in all are None where they come one by one.
    """

    done: int
    total: int | None
    sent: int
    bytes: int


@dataclass(frozen=True, slots=True)
class PublishSummary:
    """What became of the files: sent + skipped + failed = found, unless a failure or Ctrl-C stopped it before the end.

    Attributes:
        found: files that the paths named; of files that come one by one, those that came.
        sent: messages that the broker acknowledged, and the `bytes` of their images.
        seconds: from the first file to the last acknowledgement.
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
        """Whether every file was sent, but for those that an option asked to leave out."""
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
    client: Mapping[str, Any] = OPEN,
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
    """Send every regular file that `paths` name to `topic`, each as one message, acknowledged by all replicas.

    Args:
        paths: files, folders and patterns, as `producer.sources.find_files` takes them; or the files themselves.
        bootstrap_servers: `host:port,…` of the brokers.
        client: kafka-python's arguments for protocol, user and certificates; default: an open broker.
        topic: made with the brokers' defaults if it is not there.
        label_from: `parent` sends the name of the folder that a file lies in as its label.
        only_images: leave out what is no image by its first bytes.
        skip_too_large: count a file that is too large as left out on purpose.
        max_bytes: the largest image to send; where the topic takes less, its limit counts.
        shrink_to: the longest side in pixels; larger images are made smaller, as `models.shrink.shrink` does.
        limits: what may be decoded for that, and what it may cost; default: `models.bad_image.DEFAULT_LIMITS`.
        fetch: reads the files whose names are URIs, given as `Sources`: (URI, n) → at most n bytes.
        rate: images a second, evenly spaced; default: as fast as it goes.
        on_progress: called after every file.
        connect_timeout_s: how long to wait for a broker to answer.

    Returns:
        The summary. A failed delivery and Ctrl-C stop the sending, wait for what is under way, and are told there.

    Raises:
        PublishError: a path, the topic or the broker cannot be used; nothing was sent then.
    """
    sources = paths if isinstance(paths, Sources) else find_files(paths, label_from)
    reading = Reading(only_images, skip_too_large, max_bytes, shrink_to, limits, fetch)
    pace = Pace(rate)
    skipped = [Skipped(name, Reason.UNREADABLE, reason) for name, reason in sources.unreadable]
    sender = Sender(bootstrap_servers, topic, connect_timeout_s=connect_timeout_s, client=client)
    outcomes = _Outcomes()
    done = len(skipped)
    interrupted = False
    begun = time.monotonic()
    try:
        for file in sources.files:
            if outcomes.failed:  # a broker that is gone, or a topic that refuses: the next file would fare no better
                break
            message = read(file, reading, sender.max_message_bytes)
            done += 1
            if isinstance(message, Skipped):
                skipped.append(message)
            else:
                pace.wait()
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
    """What became of the messages; the counting happens on the sender's threads."""

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
