"""The offsets of a micro-batch, read from Spark's offset log."""

import json
from pathlib import Path

import pytest

from streaming.errors import ServiceError
from streaming.pipeline.decisions import OffsetRange
from streaming.pipeline.ingest import first_offsets, planned_ranges


def write_offsets(file: Path, offsets: dict[str, dict[str, int]]) -> None:
    """Write a file of Spark's offset log: version, metadata of the batch, offsets."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f'v1\n{{"batchWatermarkMs":0}}\n{json.dumps(offsets)}')


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Eleven batches: batch n ends at offset 10 (n + 1) of partition 0 and at offset 7 of partition 1."""
    write_offsets(tmp_path / "sources" / "0" / "0", {"images": {"0": 4, "1": 7}})
    for number in range(11):
        write_offsets(tmp_path / "offsets" / str(number), {"images": {"0": 10 * number + 10, "1": 7}})
    return tmp_path


def test_batch_starts_where_the_previous_one_ended(checkpoint: Path) -> None:
    assert planned_ranges(checkpoint, 1) == [OffsetRange("images", 0, 10, 20)]
    assert planned_ranges(checkpoint, 10) == [OffsetRange("images", 0, 100, 110)]


def test_first_batch_starts_at_the_initial_offsets(checkpoint: Path) -> None:
    assert planned_ranges(checkpoint, 0) == [OffsetRange("images", 0, 4, 10)]


def test_new_partition_starts_at_its_first_message(checkpoint: Path) -> None:
    write_offsets(checkpoint / "offsets" / "11", {"images": {"0": 110, "1": 8, "2": 1}})
    assert planned_ranges(checkpoint, 11) == [OffsetRange("images", 1, 7, 8), OffsetRange("images", 2, 0, 1)]


def test_new_topic_starts_at_its_first_message(checkpoint: Path) -> None:
    write_offsets(checkpoint / "offsets" / "11", {"other": {"0": 2}})
    assert planned_ranges(checkpoint, 11) == [OffsetRange("other", 0, 0, 2)]


def test_partitions_are_sorted_by_number(tmp_path: Path) -> None:
    write_offsets(tmp_path / "sources" / "0" / "0", {})
    write_offsets(tmp_path / "offsets" / "0", {"images": {"10": 1, "9": 2, "0": 3}})
    assert [one.partition for one in planned_ranges(tmp_path, 0)] == [0, 9, 10]


def test_topics_are_sorted_by_name(tmp_path: Path) -> None:
    write_offsets(tmp_path / "sources" / "0" / "0", {})
    write_offsets(tmp_path / "offsets" / "0", {"photographs": {"0": 1}, "images": {"0": 1}})
    assert [one.topic for one in planned_ranges(tmp_path, 0)] == ["images", "photographs"]


def test_batch_without_new_messages_has_no_offsets(checkpoint: Path) -> None:
    write_offsets(checkpoint / "offsets" / "11", {"images": {"0": 110, "1": 7}})
    assert planned_ranges(checkpoint, 11) == []


def test_offsets_can_use_the_topic_name_of_the_tables(checkpoint: Path) -> None:
    assert planned_ranges(checkpoint, 1, {"images": "images~2"}) == [OffsetRange("images~2", 0, 10, 20)]


def test_first_offsets_are_by_topic_and_partition(checkpoint: Path) -> None:
    assert first_offsets(checkpoint) == {"images": {0: 4, 1: 7}}


def test_first_offsets_without_a_checkpoint_are_empty(tmp_path: Path) -> None:
    assert first_offsets(tmp_path) == {}
    assert first_offsets(tmp_path / "missing") == {}


@pytest.mark.parametrize("content", ["", "v1\n{}\n{", "v1\n{}\n[1]", "v1\n{}\n7", "v1"])
def test_damaged_offset_log_is_refused_with_its_path(checkpoint: Path, content: str) -> None:
    (checkpoint / "offsets" / "10").write_text(content)
    with pytest.raises(ServiceError, match=r"the checkpoint's offsets in .*/offsets/10 "):
        planned_ranges(checkpoint, 10)
    (checkpoint / "sources" / "0" / "0").write_text(content)
    with pytest.raises(ServiceError, match=r"the checkpoint's offsets in .*/sources/0/0 "):
        first_offsets(checkpoint)


def test_missing_offset_log_is_refused(checkpoint: Path) -> None:
    (checkpoint / "offsets" / "4").unlink()
    with pytest.raises(ServiceError, match=r"offsets in .*/offsets/4 cannot be read"):
        planned_ranges(checkpoint, 5)
