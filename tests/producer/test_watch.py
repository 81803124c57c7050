"""Watching folders with a real broker: each file is sent once and complete, across restarts and an outage."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from producer.debounce import QUIET_S, Debouncer
from producer.errors import PublishError
from producer.message import read_headers
from producer.published_files import FileState, PublishedFiles
from producer.topic_files import file_stem
from producer.watch import WatchSummary, watch
from streaming.platform.broker import bootstrap_servers, running_broker
from streaming.settings import Settings
from tests.conftest import suspend
from tests.producer.topics import messages

JPEG = b"\xff\xd8\xff"
LONG_AGO = 1_600_000_000


@pytest.fixture
def servers(broker: Settings) -> str:
    return bootstrap_servers(broker)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "cat").mkdir(parents=True)
    for number in range(3):
        written(folder / "cat" / f"old {number}.jpg", b"old %d" % number)
    return folder


def written(path: Path, content: bytes, mtime: int | None = LONG_AGO) -> Path:
    path.write_bytes(JPEG + content)
    if mtime is not None:
        os.utime(path, (mtime, mtime))
    return path


class Watcher:
    """`imagestream publish --watch` in a separate process."""

    def __init__(self, servers: str, topic: str, folder: Path, *options: str) -> None:
        self.home = folder.parent / "home"
        self.summary = folder.parent / "summary.json"
        self.topic = topic
        self._command = [sys.executable, "-m", "streaming", "--home", str(self.home), "publish", "--watch"]
        self._command += ["--bootstrap-servers", servers, "--topic", topic, "--json", str(self.summary)]
        self._command += [*options, str(folder)]
        self.process = self._start()

    def _start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(self._command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def restart(self) -> None:
        self.process = self._start()

    def stop(self, number: int = signal.SIGINT) -> dict[str, Any]:
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=300)
        if number == signal.SIGKILL:
            return {}
        assert self.process.returncode == 0, out + err
        summary: dict[str, Any] = json.loads(self.summary.read_text())
        return summary

    def remembers(self, count: int) -> Callable[[], bool]:
        """A condition: the state records this many files as sent."""
        return lambda: len(remembered(self)) == count


def wait_until(condition: Callable[[], bool], timeout_s: float = 300.0) -> None:
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until, f"the condition was not met within {timeout_s:.0f} s"
        time.sleep(0.1)


NewWatcher = Callable[..., Watcher]


@pytest.fixture
def watcher(servers: str, photos: Path) -> Iterator[NewWatcher]:
    started: list[Watcher] = []

    def make(*options: str) -> Watcher:
        started.append(Watcher(servers, f"watch-{uuid.uuid4().hex[:8]}", photos, *options))
        return started[-1]

    yield make
    for one in started:
        if one.process.poll() is None:
            one.process.kill()
            one.process.communicate()


def test_each_file_is_sent_once_and_complete_across_restarts(
    servers: str, photos: Path, watcher: NewWatcher, tmp_path: Path
) -> None:
    running = watcher("--label-from", "parent")
    wait_until(running.remembers(3))

    slow = photos / "dog" / "slow.jpg"
    slow.parent.mkdir()
    with slow.open("wb") as file:  # written in parts at intervals shorter than the quiet period
        for part in (JPEG, b"first", b"second", b"third"):
            file.write(part)
            file.flush()
            time.sleep(QUIET_S / 3)
    for unfinished in (".hidden.jpg", "rsync.jpg.part"):
        written(photos / unfinished, unfinished.encode())
    (photos / "empty.jpg").touch()
    (tmp_path / "moved").mkdir()
    written(tmp_path / "moved" / "in.jpg", b"moved in")
    (tmp_path / "moved").rename(photos / "moved")
    (photos / "rsync.jpg.part").rename(photos / "rsync.jpg")
    wait_until(running.remembers(6))
    summary = running.stop()
    assert (summary["sent"], summary["skipped"], summary["undelivered"]) == (6, 0, 0)

    written(photos / "while away.jpg", b"while away")
    written(photos / "cat" / "old 1.jpg", b"old 1, changed", mtime=LONG_AGO + 1)
    running.restart()
    wait_until(running.remembers(7))  # the entry of the changed file is replaced
    wait_until(lambda: len(messages(servers, running.topic)) >= 8)
    assert running.stop(signal.SIGTERM)["sent"] == 2

    hidden_or_empty = {".hidden.jpg", "empty.jpg"}
    expected = Counter(path.read_bytes() for path in photos.rglob("*.jpg") if path.name not in hidden_or_empty)
    expected[JPEG + b"old 1"] += 1
    found = messages(servers, running.topic)
    assert Counter(message.value for message in found) == expected
    labels = {read_headers(message.headers).source: read_headers(message.headers).label for message in found}
    assert labels[str(slow)] == "dog"
    assert labels[str(photos / "moved" / "in.jpg")] == "moved"


def test_killed_process_resumes_without_loss(servers: str, photos: Path, watcher: NewWatcher) -> None:
    for number in range(120):
        written(photos / f"{number}.jpg", b"%d" % number)
    running = watcher("--rate", "40")
    wait_until(lambda: len(remembered(running)) >= 30)
    running.stop(signal.SIGKILL)
    before = len(remembered(running))
    assert before < 123
    running.restart()
    wait_until(running.remembers(123))
    assert running.stop()["sent"] == 123 - before
    found = Counter(message.key for message in messages(servers, running.topic))
    assert len(found) == 123
    assert sum(found.values()) <= 123 + 5  # acknowledged, but not recorded before the kill


def remembered(running: Watcher) -> list[object]:
    path = running.home / "publish" / f"{running.topic}.sqlite"
    try:
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as files:
            return files.execute("SELECT path FROM files WHERE sent").fetchall()
    except sqlite3.OperationalError:
        return []


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--watch"], "--watch needs folders: expected their names, got none"),
        (["--watch", "-"], "--watch needs folders: expected their names, got -"),
        (["--watch", "--from-csv", "list.csv"], "--watch needs folders: expected their names, got --from-csv"),
        (["--state", "x.sqlite", "photos"], "--state is an option of --watch: expected both"),
        (["--from-csv", "list.csv", "photos"], "expected either PATH… or --from-csv FILE, got both"),
        (["--from-csv", "list.csv", "--label-from", "parent"], "expected either --from-csv, which contains the labels"),
        (["-", "photos"], "expected - as the only path"),
        (["--rate", "0", "photos"], "rate: expected a positive number of images per second, got 0"),
        (["--rate", "nan", "photos"], "rate: expected a positive number of images per second, got nan"),
    ],
)
def test_conflicting_options_are_a_one_line_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], reason: str
) -> None:
    from streaming.cli import commands  # noqa: F401  registers every command
    from streaming.cli.app import run

    with pytest.raises(SystemExit) as ended:
        run(["--home", str(tmp_path), "publish", "--bootstrap-servers", "127.0.0.1:1", *arguments])
    error = capsys.readouterr().err
    assert (ended.value.code, error.count("\n")) == (2, 1)
    assert reason in error


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_file_is_complete_after_the_quiet_period(tmp_path: Path) -> None:
    clock, path = Clock(), tmp_path / "a.jpg"
    debouncer = Debouncer(clock)
    path.write_bytes(b"half")
    debouncer.add(str(path))
    path.write_bytes(b"the whole")
    clock.now = QUIET_S
    assert list(debouncer.complete()) == []  # it has changed since it was added
    clock.now = 2 * QUIET_S - 0.01
    assert list(debouncer.complete()) == []
    clock.now = 2 * QUIET_S
    assert [name for name, _ in debouncer.complete()] == [str(path)]
    assert len(debouncer) == 0
    debouncer.add(str(path))
    path.unlink()
    clock.now = 3 * QUIET_S
    assert list(debouncer.complete()) == []
    assert len(debouncer) == 0


def test_files_are_identified_by_path_size_and_time(tmp_path: Path) -> None:
    photo, text = written(tmp_path / "a.jpg", b"a"), written(tmp_path / "b.jpg", b"b")
    (tmp_path / "link.jpg").symlink_to(photo)
    states = [FileState.of(str(path)) for path in (photo, text)]
    with PublishedFiles(tmp_path / "state" / "state.sqlite") as published:
        published.add(states[:1], sent=True)
        published.add(states[1:], sent=False)
        assert all(state in published for state in states)
        assert FileState.of(str(tmp_path / "link.jpg")) in published
        with pytest.raises(PublishError, match="another `imagestream publish --watch` is using"):
            PublishedFiles(tmp_path / "state" / "state.sqlite")
    os.utime(photo, (LONG_AGO + 5, LONG_AGO + 5))
    with PublishedFiles(tmp_path / "state" / "state.sqlite") as published:
        assert states[0] in published
        assert states[1] not in published
        assert FileState.of(str(photo)) not in published


def test_state_that_is_another_file_is_rejected_and_unchanged(tmp_path: Path) -> None:
    photo = written(tmp_path / "a.jpg", b"a" * 5000)
    with pytest.raises(PublishError, match=r"a\.jpg: expected the state of `imagestream publish --watch`"):
        PublishedFiles(photo)
    assert photo.read_bytes() == JPEG + b"a" * 5000


def test_missing_folder_is_rejected(servers: str, tmp_path: Path) -> None:
    with pytest.raises(PublishError, match="nowhere: expected a folder to watch, but it does not exist"):
        watch(
            [str(tmp_path / "nowhere")],
            bootstrap_servers=servers,
            client={},
            state=tmp_path / "state.sqlite",
            stop=threading.Event(),
            topic=f"watch-{uuid.uuid4().hex[:8]}",
        )


def test_unacknowledged_messages_are_sent_again_after_an_outage(
    fragile_broker: Settings, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("producer.sender.DELIVERY_TIMEOUT_S", 2.0)
    monkeypatch.setattr("producer.watch.RETRY_S", 0.5)
    state = running_broker(fragile_broker.model_copy(update={"bootstrap_servers": None}))
    assert state is not None
    topic, stop, failures = f"watch-{uuid.uuid4().hex[:8]}", threading.Event(), list[str]()
    counts: list[int] = []

    def run() -> WatchSummary:
        return watch(
            [str(photos)],
            bootstrap_servers=state.address,
            client={},
            state=tmp_path / "state.sqlite",
            stop=stop,
            topic=topic,
            on_change=lambda summary: counts.append(summary.sent),
            on_failure=failures.append,
        )

    with ThreadPoolExecutor(1) as pool:
        watching = pool.submit(run)
        try:
            wait_until(lambda: counts[-1:] == [3])
            suspend(state.pid)
            for number in range(5):
                written(photos / f"new {number}.jpg", b"new %d" % number)
            wait_until(lambda: bool(failures))
            os.kill(state.pid, signal.SIGCONT)
            wait_until(lambda: counts[-1] == 8)
        finally:
            os.kill(state.pid, signal.SIGCONT)
            stop.set()
        summary = watching.result()
    assert (summary.sent, summary.undelivered, len(failures)) == (8, 0, 1)
    # Unacknowledged messages may have arrived: they are duplicated with the same id rather than lost.
    assert {message.value for message in messages(state.address, topic)} == {
        path.read_bytes() for path in photos.rglob("*.jpg")
    }


def test_state_of_a_topic_with_the_longest_name_has_its_own_file(tmp_path: Path) -> None:
    topics = ["a" * 249, "a" * 248 + "b", "images"]
    stems = [file_stem(topic) for topic in topics]
    assert stems[2] == "images"
    assert len(set(stems)) == 3
    for stem in stems:
        with PublishedFiles(tmp_path / f"{stem}.sqlite"):  # SQLite and the lock file append suffixes
            assert (tmp_path / f"{stem}.sqlite.lock").is_file()
