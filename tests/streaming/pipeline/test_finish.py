"""Applying decisions: despite crashes and concurrent processes, each table commits their files exactly once."""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from threading import Barrier

import pytest
from deltalake import DeltaTable

from streaming.errors import ServiceError
from streaming.jobs.audit import audit
from streaming.jobs.maintain import maintain
from streaming.pipeline.answers_topic import AnswersTopic
from streaming.pipeline.decisions import DECIDED_TABLES, AnswersDue, Decision, Decisions, ModelVersion
from streaming.pipeline.finish import Tables, apply, finish_decided
from streaming.pipeline.positions import Positions
from streaming.query import query
from streaming.settings import Settings
from streaming.storage.files import DataFile
from streaming.storage.store import open_store
from tests.streaming.history import NOON, QUERY_ID, SHA256, begin_stream, decision_of

BAD = {3, 14, 25}
TOPICS = {"images": "topic-id"}


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    settings = Settings(home=tmp_path)
    begin_stream(settings, {0: 0})
    return settings


def tables_of(settings: Settings) -> Tables:
    """The tables as another process opens them."""
    return Tables(settings.place.tables)


def decisions_of(settings: Settings) -> Decisions:
    return Decisions(open_store(settings.home), settings.topic)


def decide(settings: Settings, number: int) -> Decision:
    """Decide batch n with offsets 10 (n - 1) to 10 n - 1 of partition 0."""
    decision = decision_of(settings, number, {0: (10 * number - 10, 10 * number)}, bad=BAD)
    assert decisions_of(settings).decide(decision)
    return decision


def finish(settings: Settings) -> Positions | None:
    return finish_decided(settings, settings.topic, tables_of(settings))


def versions(settings: Settings) -> dict[str, int]:
    return {path.name: DeltaTable(path).version() for path in sorted(Path(settings.place.tables).iterdir())}


def check_complete(settings: Settings, batches: int) -> None:
    report = audit(settings)
    assert report.clean, [problem.text for problem in report.problems]
    assert not report.unfinished
    assert (report.batches, report.predicted + report.quarantined) == (batches, 10 * batches)


class CrashError(BaseException):
    """Simulates a crash of the process."""


@pytest.mark.parametrize("step", [None, *DECIDED_TABLES])
def test_decided_batch_interrupted_at_any_step_is_finished(settings: Settings, step: str | None) -> None:
    apply(decide(settings, 1), tables_of(settings), fresh=True)
    decision = decide(settings, 2)

    def crash(at: str) -> None:
        if at == step:
            raise CrashError

    if step is not None:
        with pytest.raises(CrashError):
            apply(decision, tables_of(settings), fresh=True, on_step=crash)
    assert finish(settings) == Positions(QUERY_ID, 2, {("images", 0): 20}, TOPICS)
    check_complete(settings, 2)
    before = versions(settings)
    assert finish(settings) == Positions(QUERY_ID, 2, {("images", 0): 20}, TOPICS)
    assert versions(settings) == before


def test_undecided_batch_is_in_no_table(settings: Settings) -> None:
    decision_of(settings, 1, {0: (0, 10)}, bad=BAD)
    assert finish(settings) == Positions(QUERY_ID, 0, {("images", 0): 0}, TOPICS)
    assert {name: DeltaTable(settings.place.table(name)).count() for name in ("predictions", "quarantine")} == {
        "predictions": 0,
        "quarantine": 0,
    }


def test_consecutive_decisions_are_finished_in_order(settings: Settings) -> None:
    for number in (1, 2, 3):
        decide(settings, number)
    assert finish(settings) == Positions(QUERY_ID, 3, {("images", 0): 30}, TOPICS)
    check_complete(settings, 3)


def test_late_decision_is_the_only_one_applied(settings: Settings) -> None:
    """The put of a dead driver arrives after the next driver has scored the same messages."""
    ours = decision_of(settings, 1, {0: (0, 12)}, bad=BAD)
    decide(settings, 1)
    assert not decisions_of(settings).decide(ours)
    assert finish(settings) == Positions(QUERY_ID, 1, {("images", 0): 10}, TOPICS)
    check_complete(settings, 1)


def test_concurrent_processes_apply_each_decision_once(settings: Settings) -> None:
    count, processes = 12, 4
    for number in range(1, count + 1):
        decide(settings, number)
    barrier = Barrier(processes)

    def run(_: int) -> Positions | None:
        barrier.wait()
        return finish(settings)

    with ThreadPoolExecutor(processes) as pool:
        found = list(pool.map(run, range(processes)))
    assert {one.number for one in found if one} == {count}
    check_complete(settings, count)


def test_racing_drivers_write_one_row_per_message(settings: Settings) -> None:
    """Each driver plans from the current positions, decides, and applies either driver's decision."""
    end, barrier = 80, Barrier(2)

    def drive(step: int) -> tuple[int, int]:
        tables, decisions = tables_of(settings), decisions_of(settings)
        won = lost = 0
        barrier.wait()
        while True:
            positions = finish_decided(settings, settings.topic, tables)
            assert positions is not None
            start = positions.ends["images", 0]
            if start >= end:
                return won, lost
            bad = {offset for offset in range(end) if offset % 7 == 3}
            mine = decision_of(settings, positions.number + 1, {0: (start, min(end, start + step))}, bad=bad)
            if decisions.decide(mine) and apply(mine, tables, fresh=True):
                won += 1
            else:
                lost += 1

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(drive, (3, 5)))
    report = audit(settings)
    assert report.clean, [problem.text for problem in report.problems]
    assert report.predicted + report.quarantined == end
    assert 0 < sum(won for won, _ in results) <= report.batches


def test_row_of_a_batch_has_the_figures_of_its_decision(settings: Settings) -> None:
    decision = decision_of(settings, 1, {0: (10, 14)}, bad={11}, left_out={0: (5, 10)})
    decision = replace(
        decision,
        challenger=ModelVersion(2, "cd" * 32),
        figures=replace(decision.figures, drift={"psi_max": 0.25}, refused="version 3: damaged"),
    )
    apply(decision, tables_of(settings), fresh=True, seconds=lambda: {"batch": 3.0, "decode": 1.5})
    (row,) = query(settings, "SELECT * FROM batches").to_pylist()
    del row["committed_at"]
    range_ = {"topic": "images", "partition": 0}
    assert row == {
        "model_version": 1,
        "bundle_sha256": SHA256,
        "query_id": QUERY_ID,
        "batch_id": 1,
        "challenger_version": 2,
        "offsets": [range_ | {"start": 10, "end": 14, "rows": 4, "log_start": None}],
        "left_out": [range_ | {"start": 5, "end": 10}],
        "topics": [("images", "topic-id")],
        "input_rows": 4,
        "predicted_rows": 3,
        "quarantined_rows": 1,
        "input_bytes": 4000,
        "seconds": [("batch", 3.0), ("decode", 1.5)],
        "refused": "version 3: damaged",
        "drift": [("psi_max", 0.25)],
        "started_at": NOON,
    }


def test_batch_without_messages_is_complete_without_files(settings: Settings) -> None:
    """Such as the offsets of an aborted transaction."""
    decision = decision_of(settings, 1, {0: (0, 2)})
    ranges = tuple(replace(one, rows=0, log_start=0) for one in decision.ranges)
    empty = replace(decision, ranges=ranges, files={}, figures=replace(decision.figures, predicted_rows=0))
    assert apply(empty, tables_of(settings), fresh=True)
    assert finish(settings) == Positions(QUERY_ID, 1, {("images", 0): 2}, TOPICS)


class Meanwhile(Tables):
    """Another driver decides batch 1, and commits its predictions, before these tables are compared with `batches`."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings.place.tables)
        self._settings = settings

    def transactions(self, stream: str) -> dict[str, int | None]:
        if decisions_of(self._settings).read(1) is None:
            decision = decide(self._settings, 1)
            self["predictions"].append_files(decision.files["predictions"], QUERY_ID, 1)
        return super().transactions(stream)


def test_batch_decided_by_another_driver_meanwhile_is_finished(settings: Settings) -> None:
    positions = finish_decided(settings, settings.topic, Meanwhile(settings))
    assert positions == Positions(QUERY_ID, 1, {("images", 0): 10}, TOPICS)
    check_complete(settings, 1)


# Answers


class Sender(AnswersTopic):
    """Records what is sent, or fails."""

    def __init__(self, settings: Settings, error: Exception | None = None) -> None:
        super().__init__(settings)
        self.sent: list[tuple[int, str]] = []
        self._error = error

    def send(self, decision: Decision, place: str, on_step: Callable[[str], None] = lambda _: None) -> None:
        if self._error is not None:
            raise self._error
        self.sent.append((decision.number, place))
        on_step("answers")


def with_answers(settings: Settings) -> Decision:
    return replace(decide(settings, 1), answers=AnswersDue("answers", "answers-id", ("predictions",)))


def test_answers_are_sent_once_with_the_tables(settings: Settings) -> None:
    decision, sender, steps = with_answers(settings), Sender(settings), set[str]()
    tables = Tables(Path(settings.place.tables))
    assert apply(decision, tables, fresh=True, answers=sender, on_step=steps.add)
    assert sender.sent == [(1, str(settings.place.tables))]
    assert steps == {*DECIDED_TABLES, "answers"}
    assert apply(decision, tables_of(settings), fresh=False, answers=sender)
    assert apply(decide(settings, 2), tables_of(settings), fresh=True, answers=sender)  # without answers
    assert len(sender.sent) == 1


@pytest.mark.parametrize("error", [None, ServiceError("the broker is away")])
def test_batch_without_its_answers_is_not_complete(settings: Settings, error: ServiceError | None) -> None:
    answers = None if error is None else Sender(settings, error)
    with pytest.raises(ServiceError, match="no sender was given" if error is None else "the broker is away"):
        apply(with_answers(settings), tables_of(settings), fresh=True, answers=answers)
    assert tables_of(settings)["batches"].transaction(QUERY_ID) is None


def test_given_sender_is_used_by_all_decided_batches(settings: Settings) -> None:
    sender = Sender(settings)
    first = replace(
        decision_of(settings, 1, {0: (0, 10)}), answers=AnswersDue("answers", "answers-id", ("predictions",))
    )
    assert decisions_of(settings).decide(first)
    positions = finish_decided(settings, settings.topic, tables_of(settings), sender)
    assert positions == Positions(QUERY_ID, 1, {("images", 0): 10}, TOPICS)
    assert sender.sent == [(1, str(settings.place.tables))]


@pytest.mark.parametrize("table", ["predictions", "quarantine"])
def test_batch_whose_commit_to_a_table_fails_is_not_complete(settings: Settings, table: str) -> None:
    decision = decide(settings, 1)
    (file,) = decision.files[table]
    path = Path(settings.place.table(table)) / file.path
    away = path.rename(path.with_name("away"))  # as if it were on the disk of another machine
    with pytest.raises(ServiceError, match="written for this commit but does not exist"):
        apply(decision, tables_of(settings), fresh=True)
    assert tables_of(settings)["batches"].transaction(QUERY_ID) is None
    away.rename(path)
    assert finish(settings) == Positions(QUERY_ID, 1, {("images", 0): 10}, TOPICS)
    check_complete(settings, 1)


# Fencing


def test_resumed_driver_changes_nothing_after_others_continued(settings: Settings) -> None:
    """It was suspended after deciding batch 1; others finished the batch and compacted the tables."""
    suspended = tables_of(settings)
    decision = decide(settings, 1)
    assert suspended["batches"].transaction(QUERY_ID) is None  # it has loaded the table
    for number in (2, 3, 4):
        decide(settings, number)
    finish(settings)
    maintain(settings)
    before = versions(settings)
    assert not apply(decision, suspended, fresh=True)
    assert versions(settings) == before
    check_complete(settings, 4)


def test_batch_finished_by_another_process_counts_as_applied(settings: Settings) -> None:
    decision, tables = decide(settings, 1), tables_of(settings)
    finish(settings)
    before = versions(settings)
    assert apply(decision, tables, fresh=True)
    assert versions(settings) == before


def test_driver_that_decides_a_pruned_number_again_is_fenced(settings: Settings) -> None:
    """No later batch had a quarantined message, so that table `quarantine` has no later transaction."""
    suspended = tables_of(settings)
    for table in (*DECIDED_TABLES, "batches"):
        suspended[table].transaction(QUERY_ID)
    late = decision_of(settings, 2, {0: (10, 20)}, bad={14})
    for number in range(1, 5):
        decision = decision_of(settings, number, {0: (10 * number - 10, 10 * number)})
        assert decisions_of(settings).decide(decision)
    finish(settings)
    assert decisions_of(settings).prune(4, keep=0, kept_for=timedelta(0)) == 3
    assert decisions_of(settings).decide(late), "the pruned number is available again"
    before = versions(settings)

    assert not apply(late, suspended, fresh=True)

    assert versions(settings) == before
    report = audit(settings)
    assert (report.clean, report.quarantined, report.predicted) == (True, 0, 40)
    assert finish(settings) == Positions(QUERY_ID, 4, {("images", 0): 40}, TOPICS)


# Refused decisions


@pytest.mark.parametrize("table", DECIDED_TABLES)
def test_table_ahead_of_batches_is_named(settings: Settings, table: str) -> None:
    apply(decide(settings, 1), tables_of(settings), fresh=True)
    rows = decision_of(settings, 2, {0: (10, 20)}, bad=BAD).files["quarantine"]
    directory = Path(tables_of(settings)[table].place)
    for file in rows:
        source, target = Path(settings.place.tables) / "quarantine" / file.path, directory / file.path
        if source != target:
            target.write_bytes(source.read_bytes())
    partition = {"date": "2024-05-06"} if table == "predictions" else {}
    tables_of(settings)[table].append_files([replace(one, partition=partition) for one in rows], QUERY_ID, 2)
    with pytest.raises(
        ServiceError, match=f"table {table} has rows of stream 'images' after batch 1, .* different copies"
    ):
        finish(settings)


def files_of_quarantine(settings: Settings, decision: Decision) -> Iterator[Path]:
    for file in decision.files["quarantine"]:
        yield Path(settings.place.tables) / "quarantine" / file.path


def test_decision_with_missing_or_truncated_files_is_refused(settings: Settings) -> None:
    decision = decide(settings, 1)
    (path,) = files_of_quarantine(settings, decision)
    content = path.read_bytes()
    before = versions(settings)
    path.unlink()
    with pytest.raises(ServiceError, match=rf"batch 1 was decided, but .* quarantine/{path.name} \(missing\)"):
        finish(settings)
    path.write_bytes(content[:-1])
    with pytest.raises(ServiceError, match=rf"quarantine/{path.name} \({len(content) - 1:,} bytes instead of"):
        finish(settings)
    created = dict.fromkeys([*DECIDED_TABLES, "batches"], 0)
    assert versions(settings) == created | before, "no table has a commit"
    path.write_bytes(content)
    finish(settings)
    check_complete(settings, 1)


def test_missing_file_of_one_table_is_named_if_others_are_committed(settings: Settings) -> None:
    decision = decide(settings, 1)
    tables_of(settings)["predictions"].append_files(decision.files["predictions"], QUERY_ID, 1)
    (path,) = files_of_quarantine(settings, decision)
    path.unlink()
    with pytest.raises(ServiceError, match=rf"damaged: quarantine/{path.name} \(missing\); restore"):
        finish(settings)


@pytest.mark.parametrize(("missing", "more"), [(3, ""), (5, " and 2 more")])
def test_three_of_the_missing_files_are_named(settings: Settings, missing: int, more: str) -> None:
    decision = decision_of(settings, 1, {0: (0, 1)})
    files = tuple(DataFile(f"{number}.parquet", 1, 1) for number in range(missing))
    names = ", ".join(rf"quarantine/{number}\.parquet \(missing\)" for number in range(3))
    with pytest.raises(ServiceError, match=f"damaged: {names}{more}; restore"):
        apply(replace(decision, files={"quarantine": files}), tables_of(settings), fresh=False)


def test_maintenance_stops_at_a_decision_with_missing_files(settings: Settings) -> None:
    apply(decide(settings, 1), tables_of(settings), fresh=True)
    decision = decide(settings, 2)
    (path,) = files_of_quarantine(settings, decision)
    path.unlink()
    before = versions(settings)
    with pytest.raises(ServiceError, match="batch 2 was decided, but files of it are missing"):
        maintain(settings)
    assert versions(settings) == dict.fromkeys(DECIDED_TABLES, 0) | before


def test_committed_files_may_have_been_compacted(settings: Settings) -> None:
    decision = decide(settings, 1)

    def crash(at: str) -> None:
        if at == "quarantine":
            raise CrashError

    with pytest.raises(CrashError):
        apply(decision, tables_of(settings), fresh=True, on_step=crash)
    (path,) = files_of_quarantine(settings, decision)
    path.unlink()  # as after compaction and vacuum
    (log,) = (Path(settings.place.tables) / "quarantine" / "_delta_log").glob("*1.json")
    assert json.loads(log.read_text().splitlines()[1])["txn"]["version"] == 1
    assert finish(settings) == Positions(QUERY_ID, 1, {("images", 0): 10}, TOPICS)


def test_decision_of_another_stream_or_offset_is_refused(settings: Settings) -> None:
    apply(decide(settings, 1), tables_of(settings), fresh=True)
    decisions = decisions_of(settings)
    for wrong, message in (
        (decision_of(settings, 2, {0: (10, 20)}, stream_id="another"), "under another stream id"),
        (decision_of(settings, 2, {0: (9, 20)}), "offset 9 of 'images' partition 0, .* ends at 10"),
        (decision_of(settings, 2, {0: (15, 20)}), "offset 15 of 'images' partition 0, .* ends at 10"),
        (decision_of(settings, 2, {0: (15, 20)}, left_out={0: (10, 14)}), "offset 15 of"),
    ):
        assert decisions.decide(wrong)
        with pytest.raises(ServiceError, match=message):
            finish(settings)
        (settings.work_dir / "streams" / "images" / "batches" / f"{2:020}.json").unlink()
    assert decisions.decide(decision_of(settings, 2, {0: (15, 20)}, left_out={0: (10, 15)}))
    assert finish(settings) == Positions(QUERY_ID, 2, {("images", 0): 20}, TOPICS)


def test_stream_that_never_started_has_nothing_to_finish(tmp_path: Path) -> None:
    home = Settings(home=tmp_path)
    assert finish(home) is None
    assert not Path(home.place.tables).exists()
