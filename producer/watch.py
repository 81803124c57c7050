"""Publishing what lies in folders and what appears in them, each file once, until told to stop.

    1. look         at the whole folders, and from then on at what changes; once in a while at all of it again, for
                    changes can be missed (a network folder, a kernel that had too many to tell)
    2. settle       a file that changed a moment ago may still be written
    3. send         unless it is remembered as sent; at most as much is under way as `Sender` allows
    4. remember     when the broker has acknowledged it, never before

Killed between the acknowledgement and step 4 it sends that file once more, with the same image id. What the broker does
not acknowledge is tried again until it does. Memory does not grow with the number of files.
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

from producer.folders import Folders
from producer.message import DEFAULT_TOPIC, Delivery
from producer.pace import Pace
from producer.read import Reading, Skipped, read
from producer.seen import FileState, Seen
from producer.sender import Sender
from producer.settle import Settling
from producer.sources import LabelFrom, SourceFile, label_of

OLD_S = 60.0  # a file that has not changed for so long is written
RETRY_S = 5.0  # after a failure nothing is sent for so long
LOOK_AGAIN_S = 60.0  # at all files
LOOKING_SHARE = 20  # and no more than a twentieth of the time
AT_ONCE = 500  # files between two looks at what has changed
IDLE_S = 0.1
LISTED = 100


@dataclass(slots=True)
class WatchSummary:
    """What became of the files.

    Attributes:
        bytes: of the images that the broker acknowledged, `sent` in number.
        skipped: files left out; the first 100 of them are in `skips`.
        undelivered: files that the broker had not acknowledged in the end; a later start sends them.
        seconds: from the start to the end.
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
    reading: Reading = Reading(),  # noqa: B008  frozen
    rate: float | None = None,
    follow_links: bool = False,
    on_change: Callable[[WatchSummary], None] | None = None,
    on_trouble: Callable[[str], None] | None = None,
) -> WatchSummary:
    """Publish every file of `folders` that `state` does not remember, and every new one, until `stop` is set.

    Hidden files, those named as copying programs name what they have not finished (.part, .tmp, …) and empty ones are
    left alone.

    Args:
        folders: with all their subfolders.
        bootstrap_servers: `host:port,…` of the brokers.
        client: kafka-python's arguments for protocol, user and certificates.
        state: the file that remembers; made if it is not there.
        topic: made with the brokers' defaults if it is not there.
        label_from: `parent` sends the name of the folder that a file lies in as its label.
        reading: what is made of each file.
        rate: images a second, evenly spaced; default: as fast as it goes.
        follow_links: also publish what symbolic links below the folders point to outside of them.
        on_change: told how things stand whenever a message was acknowledged or a file left out.
        on_trouble: told when the broker does not acknowledge, once until it does again.

    Raises:
        PublishError: a folder, the topic, the broker or the state cannot be used.
    """
    pace = Pace(rate, sleep=stop.wait)
    with Seen(state) as seen:
        sender = Sender(bootstrap_servers, topic, client=client)
        try:
            following = Folders(folders, stop, follow_links=follow_links)
            try:
                watcher = _Watcher(following, sender, seen, reading, label_from, pace, stop)
                watcher.on_change, watcher.on_trouble = on_change, on_trouble
                return watcher.run()
            finally:
                stop.set()
                following.close()
        finally:
            sender.close()


class _Watcher:
    """The loop of `watch`, on one thread; the sender's threads hand it what became of each message."""

    on_change: Callable[[WatchSummary], None] | None = None
    on_trouble: Callable[[str], None] | None = None

    def __init__(
        self,
        folders: Folders,
        sender: Sender,
        seen: Seen,
        reading: Reading,
        label_from: LabelFrom,
        pace: Pace,
        stop: threading.Event,
    ) -> None:
        self._folders = folders
        self._sender = sender
        self._seen = seen
        self._reading = reading
        self._label_from = label_from
        self._pace = pace
        self._stop = stop
        self._settling = Settling()
        self._looking: deque[Iterator[str]] = deque()
        self._look_begun = 0.0
        self._look_again = 0.0
        self._under_way: set[str] = set()  # real paths
        self._undelivered: set[str] = set()  # likewise, of what is to be tried again
        self._outcomes: queue.SimpleQueue[_Outcome] = queue.SimpleQueue()
        self._resume = 0.0
        self._summary = WatchSummary(sender.topic)

    def run(self) -> WatchSummary:
        begun = time.monotonic()
        while not self._stop.is_set():
            idle = not self._step()
            self._remember()
            if idle:
                self._stop.wait(IDLE_S)
        self._sender.finish()
        self._remember()
        self._summary.seconds = time.monotonic() - begun
        self._summary.undelivered = len(self._undelivered)
        return self._summary

    def _step(self) -> bool:
        """Look at what has changed and at some of the files; False if there was nothing to do."""
        self._note_changes()
        if time.monotonic() < self._resume:
            return False
        settled = list(islice(self._settling.settled(), AT_ONCE))
        looked = self._look()
        for name, state in settled:
            self._publish(name, state)
        for name in looked:
            self._judge(name)
        return bool(settled or looked)

    def _note_changes(self) -> None:
        changes, overflown = self._folders.changes()
        for name in changes:
            if os.path.isdir(name):  # noqa: PTH112  moved here with all its files
                self._looking.append(self._folders.files(name))
            else:
                self._settling.note(name)
        if overflown or self._settling.overflown:
            self._settling.overflown = False
            self._look_again = 0.0

    def _look(self) -> list[str]:
        """Some of the files that are looked at; in the end all of them, and after a while again."""
        now = time.monotonic()
        if self._undelivered:  # the broker is gone: no more is begun than what it left
            return []
        if not self._looking:
            if now < self._look_again:
                return []
            self._looking.append(self._folders.files())
            self._look_begun = now
            self._look_again = float("inf")
        names = list(islice(self._looking[0], AT_ONCE))
        if len(names) < AT_ONCE:
            self._looking.popleft()
            if not self._looking:
                took = time.monotonic() - self._look_begun
                self._look_again = time.monotonic() + max(LOOK_AGAIN_S, LOOKING_SHARE * took)
        return names

    def _judge(self, name: str) -> None:
        """Publish a file that was found, if it is new and surely written."""
        try:
            state = FileState.of(name)
        except OSError:
            return
        if abs(time.time() - state.mtime_ns / 1e9) < OLD_S:
            if state not in self._seen:
                self._settling.note(name)
        else:
            self._publish(name, state)

    def _publish(self, name: str, state: FileState) -> None:
        self._remember()
        if self._stop.is_set() or not state.size or state in self._seen:
            return
        if state.path in self._under_way or time.monotonic() < self._resume:
            self._settling.note(name)
            return
        message = read(
            SourceFile(name, label_of(name, self._label_from)), self._reading, self._sender.max_message_bytes
        )
        if not self._unchanged(name, state):
            self._settling.note(name)
        elif isinstance(message, Skipped):
            self._leave_out(state, message)
        else:
            self._pace.wait()
            self._under_way.add(state.path)
            told = partial(self._tell, name, state, len(message.value))
            self._sender.send(message).add_done_callback(told)

    def _unchanged(self, name: str, state: FileState) -> bool:
        try:
            return FileState.of(name) == state
        except OSError:
            return False

    def _leave_out(self, state: FileState, skipped: Skipped) -> None:
        self._seen.add([state], sent=False)
        self._summary.skipped += 1
        if len(self._summary.skips) < LISTED:
            self._summary.skips.append(skipped)
        if self.on_change:
            self.on_change(self._summary)

    def _tell(self, name: str, state: FileState, size: int, delivery: "Future[Delivery]") -> None:
        self._outcomes.put(_Outcome(name, state, size, delivery.exception()))

    def _remember(self) -> None:
        """Take in what became of the messages under way."""
        outcomes: list[_Outcome] = []
        while not self._outcomes.empty():
            outcomes.append(self._outcomes.get())
        if not outcomes:
            return
        sent = [outcome for outcome in outcomes if outcome.error is None]
        failed = [outcome for outcome in outcomes if outcome.error is not None]
        self._seen.add([outcome.state for outcome in sent], sent=True)
        self._under_way -= {outcome.state.path for outcome in outcomes}
        self._undelivered -= {outcome.state.path for outcome in sent}
        self._summary.sent += len(sent)
        self._summary.bytes += sum(outcome.bytes for outcome in sent)
        if sent and self.on_change:
            self.on_change(self._summary)
        if failed:
            self._try_again(failed)

    def _try_again(self, failed: list[_Outcome]) -> None:
        if not self._undelivered and self.on_trouble:
            self.on_trouble(str(failed[0].error))
        for outcome in failed:
            self._undelivered.add(outcome.state.path)
            self._settling.note(outcome.name, RETRY_S)
        self._resume = time.monotonic() + RETRY_S
