"""Decisions: created once, validated on reading, and pruned when old."""

import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest

from streaming.errors import ServiceError
from streaming.pipeline.answer_value import ANSWERED_TABLES
from streaming.pipeline.decisions import (
    AnswersDue,
    CountedRange,
    Decision,
    Decisions,
    ModelVersion,
    OffsetRange,
    files_of,
)
from streaming.settings import Settings
from streaming.storage.store import open_store
from tests.streaming.history import decision_of

KEY = "streams/images/batches/00000000000000000007.json"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path)


@pytest.fixture
def decision(settings: Settings) -> Decision:
    """Batch 7: six messages of two partitions, two of them quarantined; two earlier messages are lost."""
    decision = decision_of(settings, 7, {0: (10, 14), 1: (0, 2)}, bad={11, 12}, left_out={0: (8, 10)})
    return replace(decision, challenger=ModelVersion(2, "cd" * 32))


def decisions_of(settings: Settings) -> Decisions:
    return Decisions(open_store(settings.home), settings.topic)


def test_decision_round_trip(settings: Settings, decision: Decision) -> None:
    decisions = decisions_of(settings)
    assert decisions.read(7) is None
    assert decisions.decide(decision)
    assert decisions.read(7) == decision
    assert decision.input_rows == 6
    assert list(files_of(decision)) == ["predictions", "quarantine"]
    assert decision.files["predictions"][0].partition == {"date": "2024-05-06"}
    assert (settings.work_dir / KEY).is_file()


def test_batch_number_is_decided_once(settings: Settings, decision: Decision) -> None:
    decisions = decisions_of(settings)
    assert decisions.decide(decision)
    assert decisions.decide(decision), "retry of the same decision, as after a lost response"
    assert not decisions.decide(replace(decision, nonce="another"))
    assert decisions.read(7) == decision


def test_one_of_several_racing_drivers_wins_and_each_knows(settings: Settings, decision: Decision) -> None:
    drivers, numbers = 4, 20
    barrier = Barrier(drivers)

    def drive(driver: int) -> list[bool]:
        decisions = decisions_of(settings)
        barrier.wait()
        return [decisions.decide(replace(decision, number=n, nonce=f"{driver}")) for n in range(1, numbers + 1)]

    with ThreadPoolExecutor(drivers) as pool:
        won = list(pool.map(drive, range(drivers)))
    for number in range(1, numbers + 1):
        found = decisions_of(settings).read(number)
        assert found is not None
        assert [of_driver[number - 1] for of_driver in won] == [str(one) == found.nonce for one in range(drivers)]


def content_of(decision: Decision) -> dict[str, Any]:
    return dict(json.loads(decision.to_json()))


def refused(settings: Settings, data: bytes) -> str:
    path = settings.work_dir / KEY
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    with pytest.raises(ServiceError) as error:
        decisions_of(settings).read(7)
    message = str(error.value)
    assert "\n" not in message
    assert KEY in message
    assert len(message) < 1_000
    return message


def changed(*path: str | int, value: Any = None, remove: bool = False) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        inner: Any = content
        for part in path[:-1]:
            inner = inner[part]
        if remove:
            del inner[path[-1]]
        else:
            inner[path[-1]] = value

    return change


PREDICTIONS_FILE = ("files", "predictions", 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed("number", remove=True), "'number': Field required"),
        (changed("number", value="7"), "'number': Input should be a valid integer"),
        (changed("number", value=True), "'number': "),
        (changed("number", value=0), "expected a positive number"),
        (changed("number", value=8), "is that of batch 8"),
        (changed("nonce", value=""), "a nonce"),
        (changed("extra", value=1), "'extra': Unexpected keyword"),
        (changed("model", "sha256", remove=True), "'model.sha256'"),
        (changed("number", value=2**63), "expected a positive number"),
        (changed("model", "version", value=2**31), "'model': expected a positive version, got 2147483648"),
        (changed("challenger", "version", value=-1), "'model': expected a positive version, got -1"),
        (changed("challenger", "version", value=0), "'model': expected a positive version, got 0"),
        (changed("ranges", value=[]), "'ranges' must have each partition once"),
        (changed("ranges", 0, "start", value=-1), "expected offsets with start < end"),
        (changed("ranges", 0, "end", value=10), "expected offsets with start < end"),
        (changed("ranges", 0, "end", value=2**63), "expected offsets with start < end"),
        (changed("ranges", 0, "partition", value=-1), "expected offsets with start < end"),
        (changed("left_out", 0, "partition", value=2**31), "expected offsets with start < end"),
        (changed("left_out", 0, "start", value=10), "expected offsets with start < end"),
        (changed("ranges", 0, "rows", value=5), "more rows than offsets"),
        (changed("ranges", 0, "rows", value=-1), "more rows than offsets"),
        (changed("ranges", 0, "log_start", value=-1), "a 'log_start' that is not an offset"),
        (changed("ranges", 0, "log_start", value=2**63), "a 'log_start' that is not an offset"),
        (changed("ranges", 0, "rows", value=3), "'files' have 4 predicted and 2 quarantined rows"),
        (changed("ranges", 1, "partition", value=0), "each partition once"),
        (changed("left_out", 0, "topic", value="other"), "'topics' lacks 'other'"),
        (changed("topics", value={}), "'topics' lacks 'images'"),
        (changed("figures", "predicted_rows", value=3), "'files' have 4 predicted"),
        (changed("figures", "quarantined", "corrupt", value=-2), "'figures' must not be negative"),
        (changed("figures", "input_bytes", value=-1), "'figures' must not be negative"),
        (changed("figures", "input_bytes", value=2**63), "'figures' must not be negative"),
        (changed("figures", "started_at", value="yesterday"), "'figures.started_at'"),
        (changed("files", "labels", value=[]), "unexpected table 'labels'"),
        (changed("files", "predictions", value=[]), "'files' have 0 predicted"),
        (changed(*PREDICTIONS_FILE, "path", value="../quarantine/x.parquet"), "'files': expected a key"),
        (changed(*PREDICTIONS_FILE, "path", value="/etc/passwd"), "'files': expected a key"),
        (changed(*PREDICTIONS_FILE, "path", value="_delta_log/../x"), "'files': expected a key"),
        (changed(*PREDICTIONS_FILE, "bytes", value=0), "bytes and rows must be positive"),
        (changed(*PREDICTIONS_FILE, "rows", value=0), "bytes and rows must be positive"),
        (changed(*PREDICTIONS_FILE, "bytes", value=2**63), "bytes and rows must be positive"),
        (changed(*PREDICTIONS_FILE, "rows", value=2**63), "bytes and rows must be positive"),
        (changed(*PREDICTIONS_FILE, "partition", value={}), "must have the partition 'date'"),
        (changed("files", "quarantine", 0, "partition", value={"date": "x"}), "must have no partition"),
        (changed(*PREDICTIONS_FILE, "stats", value="[1]"), "the statistics must be a JSON object"),
        (changed(*PREDICTIONS_FILE, "stats", value="{"), "the statistics must be a JSON object"),
        (changed("answers", value={"topic": "a/b", "topic_id": "x", "tables": ["predictions"]}), "must have a topic"),
        (changed("answers", value={"topic": "a", "topic_id": "x", "tables": ["labels"]}), "must have tables of"),
        (changed("answers", value={"topic": "a", "topic_id": "x"}), "'answers.tables': Field required"),
        (changed("format", value=4), "has format '4', expected 1 or 2 or 3"),
        (
            changed("answers", value={"topic": "a", "topic_id": "x", "tables": ["predictions"], "schema_id": 1}),
            "must have the id of an Avro schema, or none",
        ),
        (
            changed(
                "answers",
                value={"topic": "a", "topic_id": "x", "tables": ["predictions"], "format": "avro", "schema_id": -1},
            ),
            "must have the id of an Avro schema, or none",
        ),
        (changed("format", remove=True), "has format 'None', expected 1"),
        (changed("format", value=True), "has format 'True', expected 1"),
    ],
)
def test_damaged_or_hostile_decision_is_refused_with_key_and_reason(
    settings: Settings, decision: Decision, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    content = content_of(decision)
    change(content)
    assert message in refused(settings, json.dumps(content).encode())


def test_largest_numbers_of_kafka_and_delta_are_read(settings: Settings, decision: Decision) -> None:
    most = 2**63 - 1
    left_out = (OffsetRange("images", 2**31 - 1, most - 1, most), OffsetRange("images", 0, 0, 1))
    ranges = (replace(decision.ranges[0], log_start=most), replace(decision.ranges[1], log_start=0))
    files = {name: tuple(replace(one, bytes=most) for one in of) for name, of in decision.files.items()}
    largest = replace(
        decision,
        model=ModelVersion(2**31 - 1, "ab" * 32),
        challenger=ModelVersion(1, "cd" * 32),
        ranges=ranges,
        left_out=left_out,
        files=files,
        figures=replace(decision.figures, input_bytes=most),
    )
    for schema_id in (0, 2**31 - 1):
        answers = AnswersDue("a" * 249, "topic-id", ("predictions",), "avro", schema_id)
        expected = replace(largest, answers=answers)
        assert Decision.from_json(expected.to_json(), "it") == expected
    only = CountedRange("images", 0, 0, most, most)
    files = {"predictions": (replace(decision.files["predictions"][0], rows=most),)}
    figures = replace(decision.figures, predicted_rows=most, quarantined={})
    longest = replace(decision, ranges=(only,), files=files, figures=figures)
    assert Decision.from_json(longest.to_json(), "it") == longest
    last = replace(decision, number=most, figures=replace(decision.figures, input_bytes=0))
    assert Decision.from_json(last.to_json(), "it") == last


def test_smallest_batch_and_partition_without_messages_are_read(settings: Settings) -> None:
    """Such as the offsets of an aborted transaction."""
    decision = decision_of(settings, 1, {0: (0, 1), 1: (0, 1)})
    aborted = replace(decision.ranges[1], rows=0, log_start=0)
    file = replace(decision.files["predictions"][0], bytes=1, rows=1)
    smallest = replace(
        decision,
        ranges=(decision.ranges[0], aborted),
        files={"predictions": (file,)},
        figures=replace(decision.figures, predicted_rows=1),
        answers=AnswersDue("answers", "topic-id", ANSWERED_TABLES),
    )
    assert Decision.from_json(smallest.to_json(), "it") == smallest


def test_features_of_other_messages_are_refused(settings: Settings, decision: Decision) -> None:
    files = {**decision.files, "features": decision.files["quarantine"]}
    assert "features of 2 messages, but 4 predicted" in refused(settings, replace(decision, files=files).to_json())


def test_first_of_several_problems_is_named(settings: Settings, decision: Decision) -> None:
    content = content_of(decision)
    del content["number"], content["nonce"]
    assert "'number': Field required" in refused(settings, json.dumps(content).encode())


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b"null", b"7", b"\xff\xfe", b"[" * 100_000, b'{"format": 1}', b'"' + b"x" * 10_000]
)
def test_arbitrary_data_is_refused(settings: Settings, data: bytes) -> None:
    assert "is damaged" in refused(settings, data) or "has format" in refused(settings, data)


def test_nonfinite_figures_are_readable(settings: Settings, decision: Decision) -> None:
    drift = {"psi_max": float("inf")}
    decided = replace(decision, figures=replace(decision.figures, drift=drift))
    assert decisions_of(settings).decide(decided)
    found = decisions_of(settings).read(7)
    assert found is not None
    assert found.figures.drift == drift


def test_counted_range_is_an_offset_range_with_rows() -> None:
    counted = CountedRange("images", 0, 10, 14, 4)
    assert isinstance(counted, OffsetRange)
    range_ = {"topic": "images", "partition": 0, "start": 10, "end": 14}
    assert asdict(counted) == range_ | {"rows": 4, "log_start": None}
    assert asdict(replace(counted, log_start=7))["log_start"] == 7


def test_decision_format_depends_on_its_answers(decision: Decision) -> None:
    due = replace(decision, answers=AnswersDue("answers", "topic-id", ("predictions",)))
    avro = replace(decision, answers=AnswersDue("answers", "topic-id", ("predictions",), "avro", 7))
    contents = [json.loads(one.to_json()) for one in (decision, due, avro)]
    assert [one["format"] for one in contents] == [1, 2, 3]
    assert [sorted(one.get("answers", ())) for one in contents[:2]] == [[], ["tables", "topic", "topic_id"]]
    assert [Decision.from_json(one.to_json(), "it") for one in (decision, due, avro)] == [decision, due, avro]


# Pruning


def decided(settings: Settings, decision: Decision, count: int, age_hours: float = 0) -> Decisions:
    decisions = decisions_of(settings)
    for number in range(1, count + 1):
        assert decisions.decide(replace(decision, number=number))
    then = time.time() - age_hours * 3600
    for path in (settings.work_dir / KEY).parent.iterdir():
        os.utime(path, (then, then))
    return decisions


def remaining(settings: Settings) -> list[int]:
    return sorted(int(path.stem) for path in (settings.work_dir / KEY).parent.glob("*.json"))


def test_only_complete_old_surplus_decisions_are_pruned(settings: Settings, decision: Decision) -> None:
    decisions = decided(settings, decision, 210, age_hours=25)
    assert decisions.prune(newest=205) == 5
    assert remaining(settings) == [*range(6, 211)]
    assert decisions.prune(newest=205) == 0


def test_decisions_of_the_last_day_are_kept(settings: Settings, decision: Decision) -> None:
    decisions = decided(settings, decision, 210, age_hours=23)
    assert decisions.prune(newest=210) == 0
    assert decisions.prune(newest=210, kept_for=timedelta(hours=22)) == 10


def test_decision_of_the_newest_complete_batch_is_never_pruned(settings: Settings, decision: Decision) -> None:
    decisions = decided(settings, decision, 5, age_hours=1)
    assert decisions.prune(newest=4, keep=0, kept_for=timedelta(0)) == 3
    assert remaining(settings) == [4, 5]


def test_other_objects_are_not_pruned(settings: Settings, decision: Decision) -> None:
    decisions = decided(settings, decision, 3, age_hours=1)
    note = (settings.work_dir / KEY).with_name("note.txt")
    note.write_text("ours")
    os.utime(note, (0, 0))
    assert decisions.prune(newest=3, keep=0, kept_for=timedelta(0)) == 2
    assert note.exists()
