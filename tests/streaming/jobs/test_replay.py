"""Replay with a real broker and real Delta tables: messages are sent and marked, and none is lost."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable
from kafka import KafkaConsumer, TopicPartition

from producer.message import read_headers
from streaming.errors import ServiceError
from streaming.jobs import resend
from streaming.jobs.audit import audit
from streaming.jobs.maintain import maintain
from streaming.jobs.replay import ReplayOptions, count_selected, mark_replayed, replay
from streaming.query import query
from streaming.settings import Settings
from streaming.storage.home import lock
from streaming.storage.tables import Table
from tests.conftest import imagestream
from tests.producer.topics import create_topic
from tests.streaming.history import QUERY_ID, commit_batch, new_topic, quarantined, worker_file

BAD = {number: {10 * number + 3, 10 * number + 4, 10 * number + 5} for number in range(3)}


@pytest.fixture
def settings(broker: Settings, tmp_path: Path) -> Settings:
    """Three batches of a new topic, with three quarantined messages each: truncated at odd offsets."""
    settings = broker.model_copy(update={"home": tmp_path, "topic": new_topic()})
    for number, bad in BAD.items():
        commit_batch(settings, number, {0: (10 * number, 10 * number + 10)}, bad=bad)
    return settings


@pytest.fixture
def servers(broker: Settings) -> str:
    assert broker.bootstrap_servers
    return broker.bootstrap_servers


def messages(settings: Settings) -> list[Any]:
    """All messages in the topic."""
    with closing(KafkaConsumer(bootstrap_servers=settings.bootstrap_servers, auto_offset_reset="earliest")) as consumer:
        numbers = consumer.partitions_for_topic(settings.topic)
        if not numbers:
            return []
        partitions = [TopicPartition(settings.topic, number) for number in numbers]
        consumer.assign(partitions)
        expected, found = sum(consumer.end_offsets(partitions).values()), []
        while len(found) < expected:
            found += [message for batch in consumer.poll(1000).values() for message in batch]
        return found


def quarantine_with_originals(settings: Settings, batch_id: int, *columns: dict[str, Any]) -> None:
    """Write a quarantine row for each, with the columns that the stream keeps of a message."""
    lineage = {"model_version": 1, "query_id": QUERY_ID, "batch_id": batch_id}
    rows = [quarantined(settings, 0, 100 * batch_id + number) | lineage | one for number, one in enumerate(columns)]
    table = Table(settings.place.tables, "quarantine")
    table.append_files(worker_file(Path(table.place), rows), QUERY_ID, batch_id)


def test_key_headers_and_timestamp_are_preserved(broker: Settings, tmp_path: Path, servers: str) -> None:
    settings = broker.model_copy(update={"home": tmp_path, "topic": new_topic()})
    create_topic(servers, settings.topic, message_timestamp_type="CreateTime")
    now_ms = int(time.time() * 1000)
    headers = [("label", b"cat"), ("label", b"dog"), ("bytes", b"\x00\xff"), ("none", None), ("empty", b"")]
    stored_headers = [{"key": name, "value": value} for name, value in headers]
    old_ms = now_ms - 10 * 86_400_000  # beyond Kafka's default retention of seven days
    quarantine_with_originals(
        settings, 1,
        {"key": b"\xff\x00key", "headers": stored_headers[:3], "timestamp_ms": now_ms - 5_000},
        {"key": None, "headers": None, "timestamp_ms": now_ms - 4_000},
        {"key": b"", "headers": stored_headers, "timestamp_ms": now_ms - 3_000, "value": b"with a null header"},
        {"key": b"old", "headers": [], "timestamp_ms": old_ms},
        {"key": b"none", "headers": [], "timestamp_ms": -1},
        {"key": b"bomb", "reason": "message_bomb", "value": None, "timestamp_ms": now_ms},
    )  # fmt: skip
    report = replay(settings, servers, ReplayOptions())
    assert (report.wanted, report.sent, report.complete) == (5, 5, True)
    found = sorted(messages(settings), key=lambda one: dict(one.headers)["imagestream-replay-of"])

    def mark(number: int) -> tuple[str, bytes]:
        return "imagestream-replay-of", f"{settings.topic}/0/{100 + number}".encode()

    assert [(one.key, one.headers) for one in found] == [
        (b"\xff\x00key", [*headers[:3], mark(0)]),
        (None, [mark(1)]),
        (b"", [*headers, mark(2)]),
        (b"old", [mark(3), ("imagestream-timestamp", str(old_ms).encode())]),
        (b"none", [mark(4), ("imagestream-timestamp", b"-1")]),
    ]
    assert [one.timestamp for one in found[:3]] == [now_ms - 5_000, now_ms - 4_000, now_ms - 3_000]
    assert all(one.timestamp >= now_ms for one in found[3:])
    assert found[2].value == b"with a null header"
    assert marked(settings) == [100, 101, 102, 103, 104]
    assert replay(settings, servers, ReplayOptions()).wanted == 0


def test_rows_of_an_older_schema_are_sent_once(settings: Settings, servers: str) -> None:
    file = DeltaTable(settings.place.table("quarantine")).file_uris()[0]
    older = pq.read_table(file).drop_columns(["key", "headers", "timestamp_ms"])
    pq.write_table(older, file)
    report = replay(settings, servers, ReplayOptions())
    assert (report.sent, report.complete) == (9, True)
    assert replay(settings, servers, ReplayOptions()).wanted == 0
    assert len(messages(settings)) == 9


def marked(settings: Settings) -> list[int]:
    rows = query(settings, 'SELECT "offset" FROM quarantine WHERE replayed_at IS NOT NULL ORDER BY ALL').to_pylist()
    return [row["offset"] for row in rows]


def test_messages_are_resent_unchanged_and_marked(settings: Settings, servers: str) -> None:
    before = query(settings, "SELECT * EXCLUDE replayed_at FROM quarantine ORDER BY ALL")
    report = replay(settings, servers, ReplayOptions())
    assert (report.wanted, report.sent, report.complete) == (9, 9, True)
    assert report.by_reason == {"truncated": 6, "not_an_image": 3}

    rows = query(settings, "SELECT image_id, source, label_true, value FROM quarantine").to_pylist()
    expected = {(row["value"], row["image_id"].encode(), row["source"], row["label_true"]) for row in rows}
    found = [(one.value, one.key, read_headers(one.headers)) for one in messages(settings)]
    assert len(found) == 9
    assert {(value, key, headers.source, headers.label) for value, key, headers in found} == expected

    assert marked(settings) == sorted(offset for bad in BAD.values() for offset in bad)
    assert query(settings, "SELECT * EXCLUDE replayed_at FROM quarantine ORDER BY ALL") == before
    assert audit(settings).clean


def test_marked_messages_are_resent_only_on_request(settings: Settings, servers: str) -> None:
    replay(settings, servers, ReplayOptions())
    assert replay(settings, servers, ReplayOptions()).sent == 0
    assert len(messages(settings)) == 9
    assert replay(settings, servers, ReplayOptions(again=True)).sent == 9
    assert len(messages(settings)) == 18


def test_reason_and_limit_select_the_messages(settings: Settings, servers: str) -> None:
    assert count_selected(settings, ReplayOptions()) == {"truncated": 6, "not_an_image": 3}
    report = replay(settings, servers, ReplayOptions(reason="truncated", limit=3))
    assert (report.sent, report.by_reason) == (3, {"truncated": 3})
    assert [offset % 2 for offset in marked(settings)] == [1, 1, 1]
    assert count_selected(settings, ReplayOptions()) == {"not_an_image": 3, "truncated": 3}
    assert replay(settings, servers, ReplayOptions(reason="truncated")).sent == 3


KILLED = """
import os, sys
from pathlib import Path
from streaming.jobs import replay
from streaming.settings import Settings
mark, calls = replay.mark_replayed, []
def crash_at_second(*arguments, **named):
    calls.append(1)
    if len(calls) == 2:
        os._exit(9)
    mark(*arguments, **named)
replay.mark_replayed = crash_at_second
home, topic, servers = sys.argv[1:]
replay.replay(Settings(home=Path(home), topic=topic), servers, replay.ReplayOptions())
"""


def test_replay_killed_between_sending_and_marking_loses_nothing(settings: Settings, servers: str) -> None:
    command = [sys.executable, "-c", KILLED, str(settings.home), settings.topic, servers]
    assert subprocess.run(command, check=False).returncode == 9
    assert len(messages(settings)) == 6  # two files of three
    assert len(marked(settings)) == 3

    assert replay(settings, servers, ReplayOptions()).sent == 6  # at least once: three are repeated
    values = [one.value for one in messages(settings)]
    assert (len(values), len(set(values))) == (12, 9)
    assert len(marked(settings)) == 9
    assert audit(settings).clean


def while_running(work: Callable[[int], None], during: Callable[[], Any]) -> Any:
    """Call `work` with 0, 1, 2, … in a thread, at least once, until `during` returns."""
    ended = threading.Event()
    errors: list[BaseException] = []

    def loop() -> None:
        number = 0
        try:
            while not ended.is_set() or number == 0:
                work(number)
                number += 1
        except BaseException as error:  # noqa: BLE001  checked below in the thread of the test
            errors.append(error)

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        return during()
    finally:
        ended.set()
        thread.join()
        assert errors == []


def test_marking_concurrent_with_stream_and_maintenance_loses_no_row(settings: Settings, servers: str) -> None:
    def commit_and_maintain(number: int) -> None:
        batch = 3 + number
        commit_batch(settings, batch, {0: (10 * batch, 10 * batch + 10)}, bad={10 * batch + 1})
        maintain(settings, retention_hours=0)

    def replay_in_parts() -> int:
        return sum(replay(settings, servers, ReplayOptions(limit=2)).sent for _ in range(4))

    sent = while_running(commit_and_maintain, replay_in_parts)
    assert len(marked(settings)) == sent == 8
    rest = replay(settings, servers, ReplayOptions()).sent
    report = audit(settings)
    assert report.clean
    assert len(marked(settings)) == sent + rest == report.quarantined
    assert len(messages(settings)) == report.quarantined  # no message was sent twice


def test_rows_are_marked_after_compaction_moved_them(settings: Settings) -> None:
    table = Path(settings.place.tables) / "quarantine"
    before = Path(DeltaTable(table).file_uris()[0]).name
    maintain(settings)
    mark_replayed(settings, {(settings.topic, 0, 13), (settings.topic, 0, 24)}, datetime.now(UTC), likely=before)
    assert marked(settings) == [13, 24]
    assert audit(settings).clean


def test_message_too_large_for_the_topic_stays_unmarked(settings: Settings, servers: str) -> None:
    create_topic(servers, settings.topic, max_message_bytes=2000)
    large = quarantined(settings, 0, 31, os.urandom(5000)) | {"query_id": QUERY_ID, "batch_id": 3}
    quarantine = Table(settings.place.tables, "quarantine")
    quarantine.append_files(worker_file(quarantine.place, [large]), QUERY_ID, 3)

    summary = imagestream(settings, "replay", code=1)

    assert (summary["wanted"], summary["sent"], summary["refused"], summary["failed"]) == (10, 9, 1, None)
    assert 31 not in marked(settings)
    assert len(marked(settings)) == 9


def test_dry_run_counts_and_sends_nothing(settings: Settings) -> None:
    summary = imagestream(settings, "replay", "--reason", "truncated", "--dry-run")
    assert summary == {"wanted": 6, "by_reason": {"truncated": 6}, "sent": 0}
    assert messages(settings) == []
    assert marked(settings) == []


def test_concurrent_replay_is_refused(settings: Settings, servers: str) -> None:
    with lock(settings.work_dir / "replay.lock"), pytest.raises(ServiceError, match="another replay is running"):
        replay(settings, servers, ReplayOptions())
    assert messages(settings) == []


def test_without_a_broker_nothing_is_marked(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resend, "CONNECT_TIMEOUT_S", 1.0)
    with pytest.raises(ServiceError, match="no Kafka broker answers at 127.0.0.1:1"):
        replay(settings, "127.0.0.1:1", ReplayOptions())
    assert marked(settings) == []
