"""Compaction and replay marks on real Delta tables: correct rows in any order of concurrent commits."""

import itertools
import json
import re
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable

from streaming.errors import ServiceError
from streaming.images.image_table import open_image_table
from streaming.jobs import replay, rewrite
from streaming.jobs.maintain import maintain
from streaming.jobs.replay import mark_replayed
from streaming.jobs.rewrite import compact, replace_files, write_copy
from streaming.query import query
from streaming.settings import Settings
from streaming.storage.table_features import TableFeatureError
from streaming.storage.table_log import LiveFile, open_log
from streaming.storage.tables import BATCHES, LABELS, NO_VALUE, PREDICTIONS, STATISTICS, Table
from tests.streaming.history import NOON, commit_batch, enable_deletion_vectors, quarantined, worker_file

MB = 1024**2
APP = "stream"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path)


def quarantine_files(settings: Settings, files: int) -> Table:
    """A quarantine with ten rows per file."""
    table = Table(settings.place.tables, "quarantine")
    for number in range(files):
        rows = [quarantined(settings, 0, 10 * number + at) for at in range(10)]
        table.append_files(worker_file(table.place, rows), APP, number)
    return table


def append(table: Table, settings: Settings, number: int) -> bool:
    rows = [quarantined(settings, 0, 10 * number + at) for at in range(10)]
    return table.append_files(worker_file(table.place, rows), APP, number)


def offsets(settings: Settings) -> list[int]:
    return query(settings, 'SELECT "offset" FROM quarantine ORDER BY ALL').column("offset").to_pylist()


def marked(settings: Settings) -> list[int]:
    sql = 'SELECT "offset" FROM quarantine WHERE replayed_at IS NOT NULL ORDER BY ALL'
    return query(settings, sql).column("offset").to_pylist()


def mark(settings: Settings, *marks: int) -> None:
    identities = {(settings.topic, 0, offset) for offset in marks}
    mark_replayed(settings, identities, datetime.now(UTC), likely="unknown")


def during_rewrite(monkeypatch: pytest.MonkeyPatch, module: Any, *actions: Callable[[], object]) -> None:
    """Call one of `actions` each time a rewrite in `module` has read its files and not yet committed."""
    pending, write = list(actions), rewrite.write_copy

    def write_after(*arguments: Any, **named: Any) -> Any:
        copy = write(*arguments, **named)
        if pending:
            pending.pop(0)()
        return copy

    monkeypatch.setattr(module, "write_copy", write_after)


def test_compaction_keeps_earlier_marks(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    table = quarantine_files(settings, 4)
    during_rewrite(monkeypatch, rewrite, lambda: mark(settings, 11, 25))
    assert compact(table.place, MB) is None
    assert (offsets(settings), marked(settings)) == (list(range(40)), [11, 25])
    assert len(table.files()) == 1


def test_marks_apply_after_a_concurrent_compaction(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    table = quarantine_files(settings, 4)
    during_rewrite(monkeypatch, replay, lambda: compact(table.place, MB))
    mark(settings, 11)
    assert (offsets(settings), marked(settings)) == (list(range(40)), [11])
    assert len(table.files()) == 1


def test_concurrent_compactions_merge_once(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    table = quarantine_files(settings, 4)
    during_rewrite(monkeypatch, rewrite, lambda: compact(table.place, MB))
    assert compact(table.place, MB) is None
    assert offsets(settings) == list(range(40))
    assert len(table.files()) == 1


def test_append_and_concurrent_compaction_both_succeed(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    table = quarantine_files(settings, 4)
    during_rewrite(monkeypatch, rewrite, lambda: append(table, settings, 4))
    assert compact(table.place, MB) is None
    assert offsets(settings) == list(range(50))
    assert len(table.files()) == 2


def test_append_with_a_stale_handle_after_a_compaction_succeeds(settings: Settings) -> None:
    table = quarantine_files(settings, 4)  # its handle does not know of the compaction
    assert compact(table.place, MB) is None
    assert append(table, settings, 4)
    assert not append(table, settings, 3)
    assert offsets(settings) == list(range(50))


@pytest.mark.parametrize(
    "delete",
    [
        pytest.param(lambda table, topic: table.delete_beyond(topic, {0: 15}), id="the stream"),
        pytest.param(lambda table, _: DeltaTable(table.place).delete("offset >= 15"), id="another program"),
    ],
)
def test_rows_deleted_during_a_compaction_stay_deleted(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, delete: Callable[[Table, str], object]
) -> None:
    table = quarantine_files(settings, 4)
    during_rewrite(monkeypatch, rewrite, lambda: delete(table, settings.topic))
    assert compact(table.place, MB) is None
    assert offsets(settings) == list(range(15))


def test_compaction_that_always_conflicts_reports_it_and_changes_nothing(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = quarantine_files(settings, 2)
    during_rewrite(monkeypatch, rewrite, *[lambda at=at: mark(settings, at) for at in range(rewrite.ATTEMPTS)])
    assert compact(table.place, MB) == "another job rewrote the table at the same time, 3 times"
    assert (offsets(settings), marked(settings)) == (list(range(20)), [0, 1, 2])
    assert len(table.files()) == 2


def test_marks_that_always_conflict_are_an_error_in_one_line(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = quarantine_files(settings, 2)
    log = open_log(table.place)

    def copy_of_first() -> None:
        log.refresh()
        number, (first, *_) = log.next_rewrite(), log.files()
        copy = rewrite.write_copy(table.place, [first], log.data_schema())
        assert replace_files(log, number, [first], [copy], data_change=False)

    monkeypatch.setattr(replay, "MARK_ATTEMPTS", 2)
    during_rewrite(monkeypatch, replay, copy_of_first, copy_of_first)
    with pytest.raises(ServiceError, match=r"^1 message sent but not marked as replayed, .* 2 times: .*$"):
        mark(settings, 11)
    assert (offsets(settings), marked(settings)) == (list(range(20)), [])


def test_compaction_keeps_rows_types_and_partitions(settings: Settings) -> None:
    for number in range(6):
        ranges = {0: (10 * number, 10 * number + 10), 1: (0, 5)}
        commit_batch(settings, number, ranges, bad={10 * number + 3}, drift={"psi": 0.1 * number})
    predictions = Table(settings.place.tables, "predictions")
    answer = {"top_k": [{"label": "cat", "probability": 0.5}], "label": "cat", "image_id": "x" * 64}
    for number, day in ((6, NOON.date() + timedelta(days=1)), (7, NOON.date() + timedelta(days=1)), (8, None)):
        rows = [answer | {"offset": number, "date": day, "scored_at": NOON}]
        predictions.append(pa.Table.from_pylist(rows, PREDICTIONS), APP, number)
    names = ("predictions", "quarantine", "batches")
    before = {name: query(settings, f"FROM {name} ORDER BY ALL") for name in names}

    for name in names:
        assert compact(settings.place.table(name), MB) is None

    assert {name: query(settings, f"FROM {name} ORDER BY ALL") for name in names} == before
    files = open_log(predictions.place).files()
    assert sorted(str(file.partition["date"]) for file in files) == ["2024-05-06", "2024-05-07", "None"]
    assert {Path(file.path).parent.name for file in files} == {
        f"date={file.partition['date'] or NO_VALUE}" for file in files
    }
    assert pq.read_schema(Table(settings.place.tables, "batches").files()[0]).equals(BATCHES)


def statistics_of(directory: Path) -> list[dict[str, Any]]:
    """The statistics of the files that the newest log entry adds."""
    entry = max((directory / "_delta_log").glob("*.json"))
    actions = [json.loads(line) for line in entry.read_text().splitlines()]
    return [json.loads(action["add"]["stats"]) for action in actions if "add" in action]


def test_merged_file_has_the_statistics_of_its_rows(settings: Settings) -> None:
    table = Table(settings.place.tables, "labels")
    for number, (image, label) in enumerate([("b", "cat"), ("a", None), ("c", "x" * 60)]):
        row = {"image_id": image, "label": label, "labelled_at": NOON + timedelta(hours=number)}
        table.append(pa.Table.from_pylist([row], LABELS), APP, number)
    assert compact(table.place, MB) is None
    (found,) = statistics_of(Path(table.place))
    assert found["numRecords"] == 3
    assert found["nullCount"] == {"image_id": 0, "label": 1, "labelled_at": 0, "by": 3}
    assert found["minValues"] == {"image_id": "a", "labelled_at": "2024-05-06T12:00:00.000000Z"}
    assert found["maxValues"] == {"image_id": "c", "labelled_at": "2024-05-06T14:00:00.000000Z"}
    rows = DeltaTable(table.place).to_pyarrow_table(filters=[("image_id", "=", "c")])
    assert rows.column("label").to_pylist() == ["x" * 60]


def test_only_small_files_are_merged_up_to_the_target_size(settings: Settings) -> None:
    table = quarantine_files(settings, 7)
    rows = [quarantined(settings, 0, 1000 + at, value=bytes(50_000)) for at in range(4)]
    table.append_files(worker_file(table.place, rows), "large", 0)
    sizes = {Path(file).name: Path(file).stat().st_size for file in table.files()}
    large = max(sizes, key=lambda name: sizes[name])
    small = max(size for name, size in sizes.items() if name != large)

    assert compact(table.place, 3 * small) is None

    after = {Path(file).name: Path(file).stat().st_size for file in table.files()}
    assert large in after
    assert len(after) == 1 + 3  # 3 + 3 + 1 files
    assert sum(name in sizes for name in after) == 2
    assert offsets(settings) == [*range(70), *range(1000, 1004)]


@pytest.mark.parametrize(
    ("sizes", "groups"),
    [
        ([4, 6], [[4, 6]]),  # exactly the target
        ([4, 7], []),
        ([11, 5, 1, 9, 2, 1], [[1, 1, 2, 5]]),
        ([4, 5, 5, 5, 6], [[4, 5], [5, 5]]),
        ([3, 3, 3, 3, 3, 3], [[3, 3, 3], [3, 3, 3]]),
    ],
)
def test_groups_of_two_files_or_more_are_filled_from_the_smallest(sizes: list[int], groups: list[list[int]]) -> None:
    files = [LiveFile(f"{number}.parquet", size, 1, {}) for number, size in enumerate(sizes)]
    assert [[file.bytes for file in group] for group in rewrite._groups(files, 10)] == groups


def test_many_groups_are_merged_without_a_conflict_and_without_a_change_of_rows(settings: Settings) -> None:
    table = quarantine_files(settings, 10)
    before_ms = int(time.time() * 1000)
    assert compact(table.place, 2 * max(Path(file).stat().st_size for file in table.files())) is None
    log = Path(table.place) / "_delta_log"
    commits = [
        [json.loads(line) for line in (log / f"{10 + n:020}.json").read_text().splitlines()] for n in range(1, 6)
    ]
    changes = [action for commit in commits for action in commit if action.keys() & {"add", "remove"}]
    assert [next(iter(action)) for action in changes].count("remove") == 10
    assert not any(fields["dataChange"] for action in changes for fields in action.values())
    removed = [action["remove"]["deletionTimestamp"] for action in changes if "remove" in action]
    assert before_ms <= min(removed) <= max(removed) <= time.time() * 1000
    added = [json.loads(action["add"]["stats"]) for action in changes if "add" in action]
    assert len(added) == 5
    assert all({*found["minValues"]} <= {*STATISTICS["quarantine"]} for found in added)


def test_copy_without_rows_is_refused(settings: Settings) -> None:
    table = quarantine_files(settings, 1)
    log = open_log(table.place)
    with pytest.raises(ServiceError, match=r"\.parquet should have rows, but has none$"):
        write_copy(table.place, log.files(), log.data_schema(), lambda rows: rows.slice(0, 0))


def test_row_groups_are_merged_up_to_the_size_limit(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    table = Table(settings.place.tables, "quarantine")
    for number in range(8):
        value = bytes(10_000 if number else 10)
        rows = [quarantined(settings, 0, 10 * number + at, value=value) for at in range(10)]
        table.append_files(worker_file(table.place, rows), APP, number)
    monkeypatch.setattr(rewrite, "ROW_GROUP_BYTES", 250_000)  # two large files and a half
    assert compact(table.place, 64 * MB) is None
    (file,) = table.files()
    metadata = pq.read_metadata(file)
    assert [metadata.row_group(at).num_rows for at in range(metadata.num_row_groups)] == [40, 30, 10]
    assert offsets(settings) == list(range(80))


@pytest.mark.parametrize(("more_bytes", "groups"), [(0, [2, 2, 2]), (1, [3, 3])])
def test_row_group_is_written_when_it_reaches_the_size_limit(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, more_bytes: int, groups: list[int]
) -> None:
    table = quarantine_files(settings, 1)
    place, schema = table.place, open_log(table.place).data_schema()
    paths = [file.path for file in open_log(place).files()] * 6
    (whole,) = rewrite._row_groups(place, paths, schema)
    monkeypatch.setattr(rewrite, "ROW_GROUP_BYTES", whole.nbytes // 3 + more_bytes)  # two files
    assert [rows.num_rows for rows in rewrite._row_groups(place, paths, schema)] == [10 * files for files in groups]


def test_file_of_an_older_schema_is_merged(settings: Settings) -> None:
    older = pa.schema([field for field in LABELS if field.name != "by"])
    directory = Path(settings.place.tables) / "labels"
    DeltaTable.create(directory, older)
    log = open_log(str(directory))
    for number in range(2):
        rows = pa.Table.from_pylist([{"image_id": f"old {number}", "label": "cat", "labelled_at": NOON}], older)
        pq.write_table(rows, directory / f"{number}.parquet")
        added = write_copy_of(directory, f"{number}.parquet", older)
        assert log.commit([added], APP, number)
    table = Table(settings.place.tables, "labels")
    table.append(pa.Table.from_pylist([{"image_id": "new", "by": "me"}], LABELS), APP, 2)
    assert compact(str(directory), MB) is None
    rows = DeltaTable(directory).to_pyarrow_table().sort_by("image_id").select(["image_id", "by"]).to_pylist()
    assert rows == [{"image_id": "new", "by": "me"}, *({"image_id": f"old {n}", "by": None} for n in range(2))]


def write_copy_of(directory: Path, path: str, schema: pa.Schema) -> Any:
    return write_copy(str(directory), [LiveFile(path, 1, 1, {})], schema)


def test_table_with_column_mapping_is_refused(settings: Settings) -> None:
    table = quarantine_files(settings, 3)
    log = Path(table.place) / "_delta_log"
    first = [json.loads(line) for line in (log / f"{0:020}.json").read_text().splitlines()]
    (metadata,) = [action["metaData"] for action in first if "metaData" in action]
    numbers = itertools.count(1)

    def mapped(one: dict[str, Any]) -> dict[str, Any]:
        if "metadata" in one:  # a field, at any depth
            names = {"delta.columnMapping.id": next(numbers), "delta.columnMapping.physicalName": one["name"]}
            one["metadata"] = names
        return one

    metadata["schemaString"] = json.dumps(json.loads(metadata["schemaString"], object_hook=mapped))
    metadata["configuration"]["delta.columnMapping.mode"] = "name"
    upgrade = [{"protocol": {"minReaderVersion": 2, "minWriterVersion": 5}}, {"metaData": metadata}]
    (log / f"{4:020}.json").write_text("\n".join(map(json.dumps, upgrade)))
    refusal = rf"{table.place} uses Delta's columnMapping, .* DROP FEATURE columnMapping$"
    reads: list[Callable[[], object]] = [
        lambda: mark(settings, 1),
        lambda: offsets(settings),
        lambda: append(table, settings, 5),
        lambda: Table(settings.place.tables, "quarantine"),
        lambda: open_image_table(Path(table.place)),
    ]
    for read in reads:
        with pytest.raises(TableFeatureError, match=refusal):
            read()
    assert re.search(refusal, compact(table.place, MB) or "")
    assert DeltaTable(table.place).version() == 4


def test_table_with_deletion_vectors_is_not_compacted(settings: Settings) -> None:
    table = quarantine_files(settings, 2)
    enable_deletion_vectors(table.place)
    assert "uses Delta's deletionVectors, with which files cannot be rewritten" in (compact(table.place, MB) or "")
    assert DeltaTable(table.place).version() == 3


def test_commit_unsupported_by_deltalake_is_refused_immediately(settings: Settings) -> None:
    table = quarantine_files(settings, 2)
    features = ["appendOnly", "invariants", "checkpointProtection"]  # as after DROP FEATURE in Spark
    upgrade = {"protocol": {"minReaderVersion": 1, "minWriterVersion": 7, "writerFeatures": features}}
    (Path(table.place) / "_delta_log" / f"{3:020}.json").write_text(json.dumps(upgrade))
    with pytest.raises(TableFeatureError, match=r"cannot be written: .*checkpointProtection.*DROP FEATURE"):
        append(table, settings, 5)
    with pytest.raises(TableFeatureError, match="cannot be written"):
        table.delete_beyond(settings.topic, {0: 5})
    assert offsets(settings) == list(range(20))


def test_damaged_file_stops_a_compaction_before_it_commits(settings: Settings) -> None:
    table = quarantine_files(settings, 3)
    version = DeltaTable(table.place).version()
    damaged = Path(table.files()[1])
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.raises(ServiceError, match=rf"{damaged.name} cannot be read: .*; restore it$"):
        maintain(settings)
    assert DeltaTable(table.place).version() == version
