"""The accounting of a micro-batch: counts of messages and refused batches."""

from dataclasses import astuple, replace

import pyarrow as pa
import pytest

from streaming.errors import ServiceError
from streaming.pipeline.decisions import CountedRange, OffsetRange, TopicPartition
from streaming.pipeline.reconcile import (
    OffsetRun,
    ReadCounter,
    TopicSnapshot,
    WitnessError,
    confirmed,
    partitions_with_holes,
    reconcile,
)

RANGES = [OffsetRange("images", 0, 10, 14), OffsetRange("images", 1, 0, 2)]
WHOLE = [OffsetRun("images", 0, 4, 10, 13), OffsetRun("images", 1, 2, 0, 1)]
IMAGES_0, IMAGES_1 = ("images", 0), ("images", 1)


def messages(*positions: tuple[str, int, int]) -> pa.RecordBatch:
    topics, partitions, offsets = zip(*positions, strict=True) if positions else ((), (), ())
    columns = [pa.array(topics, pa.string()), pa.array(partitions, pa.int32()), pa.array(offsets, pa.int64())]
    return pa.RecordBatch.from_arrays(columns, ["topic", "partition", "offset"])


# Counting


@pytest.mark.parametrize(
    ("batches", "runs"),
    [
        ([[]], []),
        ([[("a", 0, 5)]], [OffsetRun("a", 0, 1, 5, 5)]),
        ([[("a", 0, 5), ("a", 0, 9)], [("a", 0, 10)]], [OffsetRun("a", 0, 3, 5, 10)]),
        (
            [[("a", 0, 5), ("a", 1, 6), ("b", 1, 7)]],
            [OffsetRun("a", 0, 1, 5, 5), OffsetRun("a", 1, 1, 6, 6), OffsetRun("b", 1, 1, 7, 7)],
        ),
        ([[("a", 0, 5), ("a", 0, 5)]], [OffsetRun("a", 0, 1, 5, 5), OffsetRun("a", 0, 1, 5, 5)]),
        ([[("a", 0, 5), ("a", 0, 6)], [("a", 0, 6)]], [OffsetRun("a", 0, 2, 5, 6), OffsetRun("a", 0, 1, 6, 6)]),
        ([[("a", 0, 9), ("a", 0, 3)]], [OffsetRun("a", 0, 1, 9, 9), OffsetRun("a", 0, 1, 3, 3)]),
        (
            [[("a", 0, 5), ("b", 0, 6), ("a", 0, 7)]],
            [OffsetRun("a", 0, 1, 5, 5), OffsetRun("b", 0, 1, 6, 6), OffsetRun("a", 0, 1, 7, 7)],
        ),
        ([[("a", 1, 5), ("a", 0, 6)]], [OffsetRun("a", 1, 1, 5, 5), OffsetRun("a", 0, 1, 6, 6)]),
        (
            [[("a", 0, 5)], [("a", 1, 6)], [("a", 1, 7)]],
            [OffsetRun("a", 0, 1, 5, 5), OffsetRun("a", 1, 2, 6, 7)],
        ),
    ],
)
def test_messages_are_counted_in_runs_of_increasing_offsets(
    batches: list[list[tuple[str, int, int]]], runs: list[OffsetRun]
) -> None:
    counter = ReadCounter()
    for batch in batches:
        counter.read(messages(*batch))
    assert counter.runs == runs
    assert all(type(value) is int for run in counter.runs for value in astuple(run)[1:]), "not NumPy's types"


def test_quarantined_messages_are_counted_by_partition() -> None:
    counter = ReadCounter()
    batch = messages(("a", 0, 5), ("a", 1, 6), ("a", 1, 7))
    counter.quarantine(batch, [0, 2])
    counter.quarantine(batch, [1])
    assert counter.quarantined == {("a", 0): 1, ("a", 1): 2}


# Consistency


@pytest.mark.parametrize(
    ("runs", "predicted", "quarantined", "rows"),
    [
        (WHOLE, {IMAGES_0: 3, IMAGES_1: 2}, {IMAGES_0: 1}, (4, 2)),
        (WHOLE[1:], {}, {IMAGES_1: 2}, (0, 2)),  # a range with markers only
        ([OffsetRun("images", 0, 1, 10, 10), OffsetRun("images", 0, 1, 13, 13)], {IMAGES_0: 2}, {}, (2, 0)),
        (
            [OffsetRun("images", 0, 2, 12, 13), OffsetRun("images", 0, 2, 10, 11)],
            {IMAGES_0: 4},
            {},
            (4, 0),
        ),  # two tasks
        ([], {}, {}, (0, 0)),
    ],
)
def test_consistent_batch_is_counted(
    runs: list[OffsetRun],
    predicted: dict[TopicPartition, int],
    quarantined: dict[TopicPartition, int],
    rows: tuple[int, int],
) -> None:
    assert reconcile(7, RANGES, runs, predicted, quarantined) == (
        CountedRange("images", 0, 10, 14, rows[0]),
        CountedRange("images", 1, 0, 2, rows[1]),
    )


@pytest.mark.parametrize(
    ("runs", "predicted", "quarantined", "problem"),
    [
        (
            [*WHOLE, OffsetRun("images", 2, 1, 0, 0)],
            {IMAGES_0: 4, IMAGES_1: 2},
            {},
            "partition 2: 1 message read, none planned",
        ),
        (
            [*WHOLE, OffsetRun("other", 0, 1, 10, 10)],
            {IMAGES_0: 4, IMAGES_1: 2},
            {},
            "other partition 0: 1 message read",
        ),
        ([OffsetRun("images", 0, 1, 9, 9)], {IMAGES_0: 1}, {}, "offsets 9 to 9 read, 10 to 13 planned"),
        ([OffsetRun("images", 0, 1, 14, 14)], {IMAGES_0: 1}, {}, "offsets 14 to 14 read, 10 to 13 planned"),
        (
            [OffsetRun("images", 0, 1, 9, 9), OffsetRun("images", 0, 1, 10, 10)],
            {IMAGES_0: 2},
            {},
            "offsets 9 to 10 read, 10 to 13 planned",
        ),
        (
            [OffsetRun("images", 0, 1, 13, 13), OffsetRun("images", 0, 1, 14, 14)],
            {IMAGES_0: 2},
            {},
            "offsets 13 to 14 read, 10 to 13 planned",
        ),
        (
            [OffsetRun("images", 0, 3, 10, 12), OffsetRun("images", 0, 2, 12, 13)],
            {IMAGES_0: 5},
            {},
            "offsets 12 to 12 read twice",
        ),
        ([*WHOLE, *WHOLE], {IMAGES_0: 8, IMAGES_1: 4}, {}, "offsets 10 to 13 read twice"),
        ([OffsetRun("images", 0, 5, 10, 13)], {IMAGES_0: 5}, {}, "5 messages read, 4 offsets planned"),
        (WHOLE, {IMAGES_0: 3, IMAGES_1: 2}, {}, "4 messages read of offsets 10 to 13, 3 predicted + 0 quarantined"),
        (
            WHOLE,
            {IMAGES_0: 4, IMAGES_1: 2},
            {IMAGES_1: 1},
            "2 messages read of offsets 0 to 1, 2 predicted + 1 quarantined",
        ),
        (
            WHOLE,
            {IMAGES_0: 3, IMAGES_1: 3},
            {},
            "4 messages read of offsets 10 to 13, 3 predicted",
        ),  # of another partition
        (
            WHOLE,
            {IMAGES_0: 4, IMAGES_1: 2, ("images", 5): 1},
            {},
            "partition 5: rows of messages that were not planned",
        ),
        ([], {IMAGES_0: 1}, {}, "0 messages read of offsets 10 to 13, 1 predicted"),
    ],
)
def test_inconsistent_batch_is_refused(
    runs: list[OffsetRun], predicted: dict[TopicPartition, int], quarantined: dict[TopicPartition, int], problem: str
) -> None:
    with pytest.raises(ServiceError) as refused:
        reconcile(7, RANGES, runs, predicted, quarantined)
    assert str(refused.value).startswith("batch 7 does not add up: ")
    assert problem in str(refused.value)
    assert str(refused.value).endswith("; none of it is committed")


# Confirmation by Kafka

COUNTED = (
    CountedRange("images~2", 0, 10, 14, 3),
    CountedRange("images~2", 1, 0, 2, 2),
    CountedRange("images~2", 2, 10, 14, 4),
)
TOPICS = {"images~2": ("images", "id-1")}


def test_log_start_of_a_range_with_holes_is_recorded() -> None:
    assert partitions_with_holes(COUNTED) == [("images~2", 0)]
    ranges = confirmed(7, COUNTED, TopicSnapshot({"images": "id-1"}, {("images", 0): 12}), TOPICS)
    assert ranges == (replace(COUNTED[0], log_start=12), *COUNTED[1:])


def test_batch_of_a_recreated_topic_is_refused() -> None:
    with pytest.raises(ServiceError, match=r"'images' was recreated while batch 7 was read \(id id-2, before id-1\)"):
        confirmed(7, COUNTED, TopicSnapshot({"images": "id-2"}, {("images", 0): 0}), TOPICS)


def test_batch_of_a_missing_topic_is_read_again() -> None:
    with pytest.raises(WitnessError, match="does not know topic 'images'"):
        confirmed(7, COUNTED, TopicSnapshot({}, {}), TOPICS)
