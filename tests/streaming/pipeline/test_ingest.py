"""The offsets of a micro-batch, read from the files in which Spark notes its plan."""

import json
from pathlib import Path
from typing import Any

import pytest

from streaming.errors import ServiceError
from streaming.pipeline.ingest import batch_offsets, planned_offsets, read_query_id
from streaming.pipeline.pin import OffsetRange


def write_offsets(file: Path, offsets: dict[str, dict[str, int]]) -> None:
    """A file of Spark's offset log: a version, the batch's metadata, the offsets."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f'v1\n{{"batchWatermarkMs":0}}\n{json.dumps(offsets)}')


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Eleven batches: number n ends at offset 10 (n + 1) of partition 0, and at 7 of partition 1."""
    write_offsets(tmp_path / "sources" / "0" / "0", {"images": {"0": 4, "1": 7}})
    for number in range(11):
        write_offsets(tmp_path / "offsets" / str(number), {"images": {"0": 10 * number + 10, "1": 7}})
    return tmp_path


def test_a_batch_reaches_from_the_end_of_the_one_before_to_its_own(checkpoint: Path) -> None:
    assert batch_offsets(checkpoint, 1) == [OffsetRange("images", 0, 10, 20)]
    assert batch_offsets(checkpoint, 10) == [OffsetRange("images", 0, 100, 110)]


def test_the_first_batch_begins_where_the_source_first_looked(checkpoint: Path) -> None:
    assert batch_offsets(checkpoint, 0) == [OffsetRange("images", 0, 4, 10)]


def test_a_partition_that_is_new_begins_at_its_first_message(checkpoint: Path) -> None:
    write_offsets(checkpoint / "offsets" / "11", {"images": {"0": 110, "1": 8, "2": 1}})
    assert batch_offsets(checkpoint, 11) == [OffsetRange("images", 1, 7, 8), OffsetRange("images", 2, 0, 1)]


def test_a_topic_that_is_new_to_the_checkpoint_begins_at_its_first_message(checkpoint: Path) -> None:
    write_offsets(checkpoint / "offsets" / "11", {"other": {"0": 2}})
    assert batch_offsets(checkpoint, 11) == [OffsetRange("other", 0, 0, 2)]


def test_partitions_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    write_offsets(tmp_path / "sources" / "0" / "0", {})
    write_offsets(tmp_path / "offsets" / "0", {"images": {"10": 1, "9": 2, "0": 3}})
    assert [one.partition for one in batch_offsets(tmp_path, 0)] == [0, 9, 10]


def test_topics_are_in_the_order_of_their_names(tmp_path: Path) -> None:
    write_offsets(tmp_path / "sources" / "0" / "0", {})
    write_offsets(tmp_path / "offsets" / "0", {"photographs": {"0": 1}, "images": {"0": 1}})
    assert [one.topic for one in batch_offsets(tmp_path, 0)] == ["images", "photographs"]


def test_a_batch_without_anything_new_has_no_offsets(checkpoint: Path) -> None:
    write_offsets(checkpoint / "offsets" / "11", {"images": {"0": 110, "1": 7}})
    assert batch_offsets(checkpoint, 11) == []


def test_offsets_can_carry_the_topics_name_in_the_tables(checkpoint: Path) -> None:
    assert batch_offsets(checkpoint, 1, "images~2") == [OffsetRange("images~2", 0, 10, 20)]


def test_the_last_plan_is_the_one_with_the_highest_number(checkpoint: Path) -> None:
    (checkpoint / "offsets" / ".10.crc").write_bytes(b"crc")
    assert planned_offsets(checkpoint) == {"images": {"0": 110, "1": 7}}


def test_before_the_first_batch_nothing_is_planned(tmp_path: Path) -> None:
    assert planned_offsets(tmp_path) == {}
    (tmp_path / "offsets").mkdir()
    assert planned_offsets(tmp_path) == {}


@pytest.mark.parametrize("content", ["", "v1\n{}\n{", "v1\n{}\n[1]", "v1\n{}\n7", "v1"])
def test_a_damaged_plan_is_refused_by_its_path(checkpoint: Path, content: str) -> None:
    (checkpoint / "offsets" / "10").write_text(content)
    for read in (lambda: batch_offsets(checkpoint, 10), lambda: planned_offsets(checkpoint)):
        with pytest.raises(ServiceError, match=r"the checkpoint's offsets in .*/offsets/10 "):
            read()


def test_a_plan_that_is_missing_is_refused(checkpoint: Path) -> None:
    (checkpoint / "offsets" / "4").unlink()
    with pytest.raises(ServiceError, match=r"offsets in .*/offsets/4 cannot be read"):
        batch_offsets(checkpoint, 5)


def test_the_id_of_a_query_is_what_spark_noted(tmp_path: Path) -> None:
    (tmp_path / "metadata").write_text('{"id":"7f3c"}')
    assert read_query_id(tmp_path) == "7f3c"


@pytest.mark.parametrize("content", [None, "", "{", '{"name":"x"}'])
def test_a_directory_that_is_not_a_checkpoint_is_refused(tmp_path: Path, content: Any) -> None:
    if content is not None:
        (tmp_path / "metadata").write_text(content)
    with pytest.raises(ServiceError, match="is not the checkpoint of a stream"):
        read_query_id(tmp_path)
