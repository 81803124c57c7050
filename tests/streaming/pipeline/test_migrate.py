"""Migration of a home of an earlier release, which had checkpoints and pins, at the first start of this release."""

import fcntl
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import DeltaTable

from streaming.errors import ServiceError
from streaming.jobs.audit import audit
from streaming.pipeline.finish import Tables, finish_decided
from streaming.pipeline.migrate import begin_stream, old_stream_lock, set_checkpoint_aside
from streaming.pipeline.positions import (
    Accept,
    FirstOffset,
    Positions,
    StreamIdentity,
    identity_key,
    plan_start,
    read_identity,
)
from streaming.platform.topic import Topic
from streaming.settings import Settings
from streaming.storage.local_store import LocalStore
from streaming.storage.tables import BATCHES, SCHEMAS, Table
from tests.streaming.history import QUERY_ID, commit_batch

ENDS = {("images", 0): 15, ("images", 1): 4, ("images", 2): 2}
SAME = Topic("images", "topic-id", {0: 0, 1: 0, 2: 0}, {0: 20, 1: 4, 2: 5})


def write_old_checkpoint(settings: Settings, started: dict[int, int], ends: dict[int, int], number: int = 1) -> Path:
    """Write the files of an earlier release: Spark's checkpoint, the pins and the identity of the topic."""
    folder = settings.work_dir / "checkpoints" / settings.topic
    for file, offsets in (("sources/0/0", started), ("offsets/2", ends)):
        path = folder / "spark" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"v1\n{{}}\n{json.dumps({'images': {str(one): offset for one, offset in offsets.items()}})}")
    (folder / "spark" / "metadata").write_text(f'{{"id":"{QUERY_ID}"}}')
    (folder / "pins").mkdir()
    (folder / "pins" / "2.json").write_text(json.dumps({"query_id": QUERY_ID, "batch_id": 2}))
    (folder / "topic.json").write_text(json.dumps({"id": "topic-id", "number": number}))
    (folder / ".lock").touch()
    (settings.work_dir / f"stream-{settings.topic}.json").write_text("{}")
    return folder


@pytest.fixture
def old_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Two complete batches of two partitions, and an incomplete one with a third partition, which started at 2."""
    settings = Settings(home=tmp_path)
    columns = [field for field in BATCHES if field.name != "topics"]
    with monkeypatch.context() as before:
        before.setitem(SCHEMAS, "batches", (pa.schema(columns), None))
        commit_batch(settings, 0, {0: (0, 10), 1: (0, 4)}, bad={3})
        commit_batch(settings, 1, {0: (10, 15)})
        commit_batch(settings, 2, {0: (15, 19), 2: (2, 4)}, bad={17}, upto="quarantine")
    write_old_checkpoint(settings, {0: 0, 1: 0, 2: 2}, {0: 19, 1: 4, 2: 4})
    return settings


def start(settings: Settings, topic: Topic = SAME, accept: Accept | None = None) -> Positions:
    """What the stream does before it starts Spark."""
    accept, tables = accept or Accept(), Tables(settings.place.tables)
    with old_stream_lock(settings):
        positions = finish_decided(settings, settings.topic, tables)
        if positions is None:
            positions = begin_stream(settings, tables, [topic], accept)
        plan_start(positions, topic, accept)
        set_checkpoint_aside(settings)
    return positions


def check_migrated(settings: Settings, positions: Positions) -> None:
    identity = read_identity(settings, "images")
    assert identity is not None
    assert positions == Positions(identity.id, 0, ENDS, {"images": "topic-id"})
    assert identity.id != QUERY_ID
    report = audit(settings)
    assert report.clean, [problem.text for problem in report.problems]
    assert not report.unfinished
    assert (report.batches, report.predicted + report.quarantined) == (2, 19)
    assert not (settings.work_dir / "checkpoints" / "images").exists()
    assert not (settings.work_dir / "stream-images.json").exists()
    assert (settings.work_dir / "checkpoints.old" / "images" / "spark" / "metadata").is_file()


def test_old_home_continues_after_its_last_complete_batch(old_home: Settings) -> None:
    assert audit(old_home).unfinished
    positions = start(old_home)
    check_migrated(old_home, positions)
    assert not (old_home.work_dir / "checkpoints").exists()
    assert start(old_home) == positions, "the second start has nothing to migrate"
    commit_batch(old_home, 1, {0: (15, 20), 2: (2, 5)}, query_id=positions.stream or "")
    assert audit(old_home).clean


class CrashError(BaseException):
    """Simulates a crash of the process."""


def crashing(function: Callable[..., Any], after: int) -> Callable[..., Any]:
    """The function, with a crash before its call number `after` + 1, and another one after the next call."""
    calls = 0

    def call(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == after + 1:
            raise CrashError
        result = function(*arguments, **named)
        if calls == after + 2:
            raise CrashError
        return result

    return call


@pytest.mark.parametrize(
    ("where", "name", "after"),
    [
        *((Table, "delete_beyond", table) for table in range(2)),
        (LocalStore, "create", 0),
        (Path, "rename", 0),
    ],
)
def test_migration_interrupted_at_any_step_is_repeated(
    old_home: Settings, monkeypatch: pytest.MonkeyPatch, where: Any, name: str, after: int
) -> None:
    monkeypatch.setattr(LocalStore, "check_conditional", lambda _: None)
    monkeypatch.setattr(where, name, crashing(getattr(where, name), after))
    crashes = 0
    for _ in range(3):
        try:
            positions = start(old_home)
        except CrashError:
            crashes += 1
    assert crashes
    check_migrated(old_home, positions)


def test_tables_without_streams_folder_continue(old_home: Settings) -> None:
    first = start(old_home)
    commit_batch(old_home, 1, {0: (15, 18)}, query_id=first.stream or "")
    commit_batch(old_home, 2, {0: (18, 20)}, query_id=first.stream or "", upto="predictions")
    shutil.rmtree(old_home.work_dir / "streams")
    positions = start(old_home)
    assert positions.stream not in {first.stream, QUERY_ID}
    assert positions.of_topic("images") == {0: 18, 1: 4, 2: 0}
    assert audit(old_home).clean


def test_new_home_starts_at_the_beginning_of_the_topic(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    positions = start(settings, Topic("images", "topic-id", {0: 3, 1: 0}, {0: 9, 1: 0}))
    assert (positions.number, positions.ends, positions.topics) == (
        0,
        {("images", 0): 3, ("images", 1): 0},
        {"images": "topic-id"},
    )
    names = {path.name for path in Path(settings.place.tables).iterdir()}
    assert names == {"predictions", "quarantine", "features", "shadow", "batches"}


def test_new_stream_is_refused_without_conditional_puts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def overwrite(store: LocalStore, key: str, data: bytes) -> bool:
        store.put(key, data)
        return True

    settings = Settings(home=tmp_path)
    with monkeypatch.context() as overwriting:
        overwriting.setattr(LocalStore, "_put_if_absent", overwrite)
        with pytest.raises(ServiceError, match="does not support conditional puts"):
            start(settings)
    assert read_identity(settings, "images") is None


def test_new_stream_is_refused_a_topic_that_another_one_reads(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    start(settings)
    other = Settings(home=tmp_path, topic="faces")
    with pytest.raises(ServiceError, match="topic 'images' is read by stream 'images'"):
        begin_stream(other, Tables(other.place.tables), [SAME], Accept())
    assert read_identity(other, "faces") is None


@pytest.mark.parametrize(("reads", "topic"), [("", "images"), ("images,faces", "images,faces")])
def test_identity_has_the_subscription(tmp_path: Path, reads: str, topic: str) -> None:
    settings = Settings(home=tmp_path)
    begin_stream(settings, Tables(settings.place.tables), [SAME], Accept(), reads=reads)
    identity = read_identity(settings, "images")
    assert identity is not None
    assert identity.topic == topic


def test_simultaneous_first_starts_have_the_identity_that_was_created_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, create = Settings(home=tmp_path), LocalStore.create
    theirs = StreamIdentity("theirs", "images", {"images": "topic-id"}, (FirstOffset("images", 0, 7),))

    def create_second(store: LocalStore, key: str, data: bytes) -> bool:
        if key == identity_key("images"):
            assert create(store, key, theirs.to_json())
        return create(store, key, data)

    monkeypatch.setattr(LocalStore, "create", create_second)
    positions = begin_stream(settings, Tables(settings.place.tables), [SAME], Accept())
    assert positions == Positions("theirs", 0, {("images", 0): 7}, {"images": "topic-id"})
    assert read_identity(settings, "images") == theirs


def test_identity_deleted_during_a_start_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, create = Settings(home=tmp_path), LocalStore.create

    def lose(store: LocalStore, key: str, data: bytes) -> bool:
        return key != identity_key("images") and create(store, key, data)

    monkeypatch.setattr(LocalStore, "create", lose)
    with pytest.raises(ServiceError, match=r"streams/images/stream\.json was created by another stream and deleted"):
        begin_stream(settings, Tables(settings.place.tables), [SAME], Accept())


def test_old_home_without_batches_starts_at_the_checkpoint(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    write_old_checkpoint(settings, {0: 2, 1: 0, 2: 0}, {0: 2})
    assert start(settings).of_topic("images") == {0: 2, 1: 0, 2: 0}


def test_rows_of_an_incomplete_batch_stay_until_kafka_has_its_messages(old_home: Settings) -> None:
    shortened = Topic("images", "topic-id", {0: 16, 1: 0, 2: 0}, {0: 20, 1: 4, 2: 5})
    before = DeltaTable(old_home.place.table("predictions")).version()
    with pytest.raises(ServiceError, match="partition 0: loss of up to 1 message, from offset 15 to 15"):
        start(old_home, shortened)
    assert DeltaTable(old_home.place.table("predictions")).version() == before
    assert read_identity(old_home, "images") is None
    positions = start(old_home, shortened, Accept(loss=True))
    assert positions.of_topic("images") == {0: 15, 1: 4, 2: 2}, "the first batch records what is left out"


def test_topic_recreated_before_the_migration_is_detected(old_home: Settings) -> None:
    recreated = Topic("images", "another", {0: 0, 1: 0, 2: 0}, {0: 90, 1: 90, 2: 90})
    with pytest.raises(ServiceError, match=r"was recreated \(id another, before topic-id\)"):
        start(old_home, recreated)
    positions = start(old_home, recreated, Accept(new_topic=True))
    assert plan_start(positions, recreated, Accept(new_topic=True)).topics == {"images~2": recreated.id}
    with pytest.raises(ServiceError, match="was recreated"):
        start(old_home, recreated)


def test_topic_number_is_migrated(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    commit_batch(settings, 0, {0: (0, 5)})
    write_old_checkpoint(settings, {0: 0}, {0: 0}, number=2)
    positions = start(settings, Topic("images", "topic-id", {0: 0}, {0: 3}))
    assert (positions.topic("images"), positions.of_topic("images~2")) == ("images~2", {0: 0})


def test_running_stream_of_the_earlier_release_is_reported(old_home: Settings) -> None:
    with (old_home.work_dir / "checkpoints" / "images" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ServiceError, match="a stream of an earlier release is running on topic 'images'"):
            start(old_home)
    assert read_identity(old_home, "images") is None


@pytest.mark.parametrize("content", ["[", "{}", '{"id": 1, "number": 1}', '{"id": "x", "number": "1"}', "[]"])
def test_damaged_topic_file_is_named(old_home: Settings, content: str) -> None:
    (old_home.work_dir / "checkpoints" / "images" / "topic.json").write_text(content)
    with pytest.raises(ServiceError, match=r"topic\.json, .* is damaged"):
        start(old_home)


def test_other_topics_keep_their_checkpoints(old_home: Settings) -> None:
    other = old_home.work_dir / "checkpoints" / "other"
    other.mkdir()
    start(old_home)
    assert other.is_dir()
    (old_home.work_dir / "checkpoints" / "images").mkdir()  # as restored from a backup
    start(old_home)
    assert sorted(path.name for path in (old_home.work_dir / "checkpoints.old").iterdir()) == ["images", "images.2"]
