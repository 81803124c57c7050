"""Publishing to a real broker: delivered, skipped and failed files."""

import importlib
import json
import os
import signal
import socket
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import producer
from producer import publish as publish_files
from producer.errors import PublishError
from producer.message import HEADER_MARGIN_BYTES, MAX_MESSAGE_BYTES, read_headers
from streaming.platform.broker import bootstrap_servers, running_broker
from streaming.settings import Settings
from tests.conftest import command_here, suspend
from tests.producer.topics import create_topic, messages

JPEG = b"\xff\xd8\xff"


@pytest.fixture
def servers(broker: Settings) -> str:
    return bootstrap_servers(broker)


@pytest.fixture
def topic() -> str:
    return f"publish-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("photos/cat/a.jpg", "photos/dog/un été.jpg"):
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        path.write_bytes(JPEG + name.encode())
    (tmp_path / "photos/notes.txt").write_bytes(b"not an image")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "photos"


def consumed(servers: str, topic: str) -> dict[str, Any]:
    """The messages of a topic by source; fails on duplicate sources."""
    found = messages(servers, topic)
    by_source = {read_headers(message.headers).source or "": message for message in found}
    assert len(by_source) == len(found)
    return by_source


def imagestream(servers: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    line = ("publish", "--bootstrap-servers", servers, *arguments)
    return subprocess.CompletedProcess(line, *command_here(*line))


def test_every_file_arrives_once_with_its_bytes_name_and_label(servers: str, topic: str, photos: Path) -> None:
    summary = publish_files(["photos"], bootstrap_servers=servers, topic=topic, label_from="parent")
    assert (summary.found, summary.sent, summary.skipped, summary.failed) == (3, 3, [], [])
    assert summary.complete
    found = consumed(servers, topic)
    assert {name: message.value for name, message in found.items()} == {
        name: Path(name).read_bytes() for name in ("photos/cat/a.jpg", "photos/dog/un été.jpg", "photos/notes.txt")
    }
    assert {read_headers(message.headers).label for message in found.values()} == {"cat", "dog", "photos"}
    assert summary.bytes == sum(len(message.value) for message in found.values())


def test_only_images_skips_other_files_by_content(servers: str, topic: str, photos: Path) -> None:
    (photos / "fake.jpg").write_bytes(b"text with the extension of an image")
    summary = publish_files(["photos"], bootstrap_servers=servers, topic=topic, only_images=True)
    assert {skip.path for skip in summary.skipped} == {"photos/fake.jpg", "photos/notes.txt"}
    assert {skip.reason for skip in summary.skipped} == {"not an image"}
    assert summary.complete
    assert set(consumed(servers, topic)) == {"photos/cat/a.jpg", "photos/dog/un été.jpg"}


def test_too_large_file_is_skipped_and_the_others_are_sent(servers: str, topic: str, photos: Path) -> None:
    with (photos / "huge.jpg").open("wb") as stream:
        stream.truncate(MAX_MESSAGE_BYTES + 1)
    summary = publish_files(["photos"], bootstrap_servers=servers, topic=topic)
    assert [(skip.path, skip.reason) for skip in summary.skipped] == [("photos/huge.jpg", "too large")]
    assert summary.sent == 3
    assert not summary.complete
    assert publish_files(["photos"], bootstrap_servers=servers, topic=topic, skip_too_large=True).complete


def test_image_of_exactly_the_limit_arrives(servers: str, topic: str, tmp_path: Path) -> None:
    (tmp_path / "large.jpg").write_bytes(JPEG + os.urandom(MAX_MESSAGE_BYTES - len(JPEG)))
    assert publish_files([tmp_path / "large.jpg"], bootstrap_servers=servers, topic=topic).complete
    (message,) = consumed(servers, topic).values()
    assert len(message.value) == MAX_MESSAGE_BYTES


def test_lower_limit_of_the_topic_applies(servers: str, topic: str, tmp_path: Path) -> None:
    create_topic(servers, topic, max_message_bytes=10_000)
    for name, size in {"fits.jpg": 9_000, "headers-too-many.jpg": 9_990, "large.jpg": 10_001}.items():
        (tmp_path / name).write_bytes(JPEG + bytes(size - len(JPEG)))
    summary = publish_files([tmp_path], bootstrap_servers=servers, topic=topic)
    assert [Path(skip.path).name for skip in summary.skipped] == ["headers-too-many.jpg", "large.jpg"]
    assert (summary.sent, summary.failed) == (1, [])
    assert {Path(name).name for name in consumed(servers, topic)} == {"fits.jpg"}


def test_batches_respect_a_small_limit_of_the_topic(servers: str, topic: str, tmp_path: Path) -> None:
    create_topic(servers, topic, max_message_bytes=10_000)
    for number in range(50):
        (tmp_path / f"{number}.jpg").write_bytes(JPEG + bytes(4_000) + bytes([number]))
    assert publish_files([tmp_path], bootstrap_servers=servers, topic=topic).complete
    assert len(consumed(servers, topic)) == 50


def test_unreadable_file_is_skipped_and_makes_the_summary_incomplete(servers: str, topic: str, photos: Path) -> None:
    (photos / "gone.jpg").symlink_to("nowhere")
    summary = publish_files(["photos"], bootstrap_servers=servers, topic=topic)
    assert [(skip.path, skip.reason) for skip in summary.skipped] == [("photos/gone.jpg", "unreadable")]
    assert (summary.found, summary.sent, summary.complete) == (4, 3, False)


def test_progress_ends_at_the_number_of_files(servers: str, topic: str, photos: Path) -> None:
    seen: list[producer.Progress] = []
    publish_files(["photos"], bootstrap_servers=servers, topic=topic, on_progress=seen.append)
    assert [(progress.done, progress.total) for progress in seen] == [(1, 3), (2, 3), (3, 3)]


def test_interrupted_publishing_reports_how_many_were_sent(servers: str, topic: str, photos: Path) -> None:
    def interrupt(progress: producer.Progress) -> None:
        if progress.done == 2:
            raise KeyboardInterrupt

    summary = publish_files(["photos"], bootstrap_servers=servers, topic=topic, on_progress=interrupt)
    assert (summary.found, summary.sent, summary.interrupted, summary.complete) == (3, 2, True, False)
    assert len(consumed(servers, topic)) == 2


def test_invalid_topic_name_is_a_one_line_error(servers: str, photos: Path) -> None:
    with pytest.raises(PublishError, match=r"topic 'no such/topic' at .* cannot be written to"):
        publish_files(["photos"], bootstrap_servers=servers, topic="no such/topic")


@pytest.fixture
def silent_server() -> Iterator[str]:
    """The address of a server that accepts connections and never responds."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def test_unresponsive_broker_is_an_error_with_its_address(silent_server: str, photos: Path) -> None:
    with pytest.raises(PublishError) as caught:
        publish_files(["photos"], bootstrap_servers=silent_server, connect_timeout_s=1.0)
    assert silent_server in str(caught.value)
    assert "imagestream broker start" in str(caught.value)


def test_files_in_flight_are_reported_if_the_broker_stops_responding(
    fragile_broker: Settings, topic: str, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.import_module("producer.sender"), "DELIVERY_TIMEOUT_S", 2.0)
    state = running_broker(fragile_broker)
    assert state is not None

    def pause(progress: producer.Progress) -> None:
        if progress.done == 1:
            suspend(state.pid)

    try:
        summary = publish_files(["photos"], bootstrap_servers=state.address, topic=topic, on_progress=pause)
    finally:
        os.kill(state.pid, signal.SIGCONT)
    assert summary.failed
    assert {failure.path for failure in summary.failed} <= {str(path) for path in Path("photos").rglob("*")}
    assert not summary.complete
    assert summary.sent + len(summary.failed) <= summary.found


def test_command_fails_if_a_file_is_too_large_unless_allowed(servers: str, topic: str, photos: Path) -> None:
    with (photos / "huge.jpg").open("wb") as stream:
        stream.write(JPEG)
        stream.truncate(MAX_MESSAGE_BYTES + HEADER_MARGIN_BYTES)
    arguments = ["--topic", topic, "--only-images", "--json", "summary.json", "photos"]
    done = imagestream(servers, *arguments)
    assert done.returncode == 1
    assert "sent 2 of 4 files" in done.stdout
    assert "skipped photos/huge.jpg: too large" in done.stderr
    assert "skipped photos/notes.txt: not an image" in done.stderr
    assert imagestream(servers, *arguments, "--skip-too-large").returncode == 0
    summary = json.loads(Path("summary.json").read_text(encoding="utf-8"))
    assert (summary["sent"], summary["complete"]) == (2, True)


def test_missing_path_is_a_one_line_error(servers: str, photos: Path) -> None:
    done = imagestream(servers, "photos", "nowhere")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines() == ["error: nowhere: expected a file, a folder or a pattern, but it does not exist"]
