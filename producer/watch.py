"""Publishing the files in folders and every new one, each once, until stopped.

    1. scan         the folders, then follow changes; rescan from time to time, because changes can be missed (network
                    folders, a full event queue of the kernel)
    2. debounce     a file that changed a moment ago may still be written
    3. send         unless it was sent before; `Sender` bounds the messages in flight
    4. record       once the broker has acknowledged it, never before

If the process is killed between the acknowledgement and step 4, the file is sent again with the same image id. Messages
that are not acknowledged are retried until they are. Memory does not grow with the number of files.
"""

import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from producer.debounce import Debouncer
from producer.folder_watcher import FolderWatcher
from producer.message import DEFAULT_TOPIC, Delivery
from producer.published_files import FileState, PublishedFiles
from producer.rate_limiter import RateLimiter
from producer.read import ReadOptions, Skipped, read
from producer.sender import Sender
from producer.sources import LabelFrom, SourceFile, label_of

STABLE_S = 60.0  # a file unchanged for this long is complete: no need to debounce it
RETRY_S = 5.0  # pause after a failure
RESCAN_S = 60.0
RESCAN_FACTOR = 20  # the interval of scans is at least this many times their duration
CHUNK_FILES = 500  # files handled between two checks for changes
IDLE_S = 0.1
MAX_SKIPS = 100


@dataclass(slots=True)
class WatchSummary:
    """The outcome of watching.

    Attributes:
        sent: messages that the broker acknowledged.
        bytes: the size of their images.
        undelivered: files that the broker had not acknowledged at the end; the next start sends them.
        skips: the first 100 files that were skipped.
    """

    topic: str
    sent: int = 0
    bytes: int = 0
    skipped: int = 0
    undelivered: int = 0
    seconds: float = 0.0
    skips: list[Skipped] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Outcome:
    name: str
    state: FileState
    bytes: int
    error: BaseException | None


def watch(
    folders: Sequence[str],
    *,
    bootstrap_servers: str,
    client: Mapping[str, Any],
    state: Path,
    stop: threading.Event,
    topic: str = DEFAULT_TOPIC,
    label_from: LabelFrom = LabelFrom.NONE,
    options: ReadOptions = ReadOptions(),  # noqa: B008  frozen
    rate: float | None = None,
    follow_links: bool = False,
    on_change: Callable[[WatchSummary], None] | None = None,
    on_failure: Callable[[str], None] | None = None,
) -> WatchSummary:
    """Publish every file in `folders` that was not published before, and every new one, until `stop` is set.

    Hidden, empty and unfinished files (.part, .tmp, …) are ignored.

    Args:
        folders: the folders, including their subfolders.
        bootstrap_servers: addresses of the brokers, `host:port,…`.
        client: kafka-python's security arguments.
        state: the database of published files, created if it does not exist.
        stop: ends watching when it is set.
        topic: the topic, created with the broker's defaults if it does not exist.
        label_from: `parent` sends the name of a file's folder as its label.
        rate: the maximum rate in images per second, evenly spaced; default: no limit.
        follow_links: also publish files outside the folders that symbolic links in them point to.
        on_change: called with the current summary when messages are acknowledged or a file is skipped.
        on_failure: called with the reason when the broker stops acknowledging messages.

    Raises:
        PublishError: a folder, the topic, the broker or the database cannot be used.
    """
    limiter = RateLimiter(rate, sleep=stop.wait)
    with PublishedFiles(state) as published:
        sender = Sender(bootstrap_servers, topic, client=client)
        try:
            folder_watcher = FolderWatcher(folders, stop, follow_links=follow_links)
            try:
                publisher = _FolderPublisher(folder_watcher, sender, published, options, label_from, limiter, stop)
                publisher.on_change, publisher.on_failure = on_change, on_failure
                return publisher.run()
            finally:
                stop.set()
                folder_watcher.close()
        finally:
            sender.close()


class _FolderPublisher:
    """The loop of `watch`, on one thread; the sender's threads queue the outcome of each message."""

    on_change: Callable[[WatchSummary], None] | None = None
    on_failure: Callable[[str], None] | None = None

    def __init__(
        self,
        folders: FolderWatcher,
        sender: Sender,
        published: PublishedFiles,
        options: ReadOptions,
        label_from: LabelFrom,
        limiter: RateLimiter,
        stop: threading.Event,
    ) -> None:
        self._folders = folders
        self._sender = sender
        self._published = published
        self._options = options
        self._label_from = label_from
        self._limiter = limiter
        self._stop = stop
        self._debouncer = Debouncer()
        self._scans: deque[Iterator[str]] = deque()
        self._scan_begun = 0.0
        self._next_scan = 0.0
        self._in_flight: set[str] = set()  # real paths
        self._undelivered: set[str] = set()  # real paths of files to retry
        self._outcomes: queue.SimpleQueue[_Outcome] = queue.SimpleQueue()
        self._resume_at = 0.0
        self._summary = WatchSummary(sender.topic)

    def run(self) -> WatchSummary:
        begun = time.monotonic()
        while not self._stop.is_set():
            idle = not self._step()
            self._record_outcomes()
            if idle:
                self._stop.wait(IDLE_S)
        self._sender.finish()
        self._record_outcomes()
        self._summary.seconds = time.monotonic() - begun
        self._summary.undelivered = len(self._undelivered)
        return self._summary

    def _step(self) -> bool:
        """Handle changes and some of the scanned files; False if there was nothing to do."""
        self._take_changes()
        if time.monotonic() < self._resume_at:
            return False
        complete = list(islice(self._debouncer.complete(), CHUNK_FILES))
        scanned = self._scan()
        for name, state in complete:
            self._publish(name, state)
        for name in scanned:
            self._consider(name)
        return bool(complete or scanned)

    def _take_changes(self) -> None:
        changes, overflowed = self._folders.changes()
        for name in changes:
            if os.path.isdir(name):  # noqa: PTH112  a folder was moved here with its files
                self._scans.append(self._folders.files(name))
            else:
                self._debouncer.add(name)
        if overflowed or self._debouncer.overflowed:
            self._debouncer.overflowed = False
            self._next_scan = 0.0

    def _scan(self) -> list[str]:
        """The next files of the scans under way; starts a new scan when one is due."""
        now = time.monotonic()
        if self._undelivered:  # the broker is down: retry these first
            return []
        if not self._scans:
            if now < self._next_scan:
                return []
            self._scans.append(self._folders.files())
            self._scan_begun = now
            self._next_scan = float("inf")
        names = list(islice(self._scans[0], CHUNK_FILES))
        if len(names) < CHUNK_FILES:
            self._scans.popleft()
            if not self._scans:
                took = time.monotonic() - self._scan_begun
                self._next_scan = time.monotonic() + max(RESCAN_S, RESCAN_FACTOR * took)
        return names

    def _consider(self, name: str) -> None:
        """Publish a scanned file if it is new, debounced if it changed recently."""
        try:
            state = FileState.of(name)
        except OSError:
            return
        if abs(time.time() - state.mtime_ns / 1e9) < STABLE_S:
            if state not in self._published:
                self._debouncer.add(name)
        else:
            self._publish(name, state)

    def _publish(self, name: str, state: FileState) -> None:
        self._record_outcomes()
        if self._stop.is_set() or not state.size or state in self._published:
            return
        if state.path in self._in_flight or time.monotonic() < self._resume_at:
            self._debouncer.add(name)
            return
        message = read(
            SourceFile(name, label_of(name, self._label_from)), self._options, self._sender.max_message_bytes
        )
        if not self._unchanged(name, state):
            self._debouncer.add(name)
        elif isinstance(message, Skipped):
            self._skip(state, message)
        else:
            self._limiter.wait()
            self._in_flight.add(state.path)
            put = partial(self._put_outcome, name, state, len(message.value))
            self._sender.send(message).add_done_callback(put)

    def _unchanged(self, name: str, state: FileState) -> bool:
        try:
            return FileState.of(name) == state
        except OSError:
            return False

    def _skip(self, state: FileState, skipped: Skipped) -> None:
        self._published.add([state], sent=False)
        self._summary.skipped += 1
        if len(self._summary.skips) < MAX_SKIPS:
            self._summary.skips.append(skipped)
        if self.on_change:
            self.on_change(self._summary)

    def _put_outcome(self, name: str, state: FileState, size: int, delivery: "Future[Delivery]") -> None:
        self._outcomes.put(_Outcome(name, state, size, delivery.exception()))

    def _record_outcomes(self) -> None:
        """Record the outcomes that the sender's threads have queued."""
        outcomes: list[_Outcome] = []
        while not self._outcomes.empty():
            outcomes.append(self._outcomes.get())
        if not outcomes:
            return
        sent = [outcome for outcome in outcomes if outcome.error is None]
        failed = [outcome for outcome in outcomes if outcome.error is not None]
        self._published.add([outcome.state for outcome in sent], sent=True)
        self._in_flight -= {outcome.state.path for outcome in outcomes}
        self._undelivered -= {outcome.state.path for outcome in sent}
        self._summary.sent += len(sent)
        self._summary.bytes += sum(outcome.bytes for outcome in sent)
        if sent and self.on_change:
            self.on_change(self._summary)
        if failed:
            self._retry(failed)

    def _retry(self, failed: list[_Outcome]) -> None:
        if not self._undelivered and self.on_failure:
            self.on_failure(str(failed[0].error))
        for outcome in failed:
            self._undelivered.add(outcome.state.path)
            self._debouncer.add(outcome.name, RETRY_S)
        self._resume_at = time.monotonic() + RETRY_S
