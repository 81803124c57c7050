"""The lag of a partition, and how far the tables have come."""

from pathlib import Path

import pytest

from streaming.errors import ServiceError
from streaming.pipeline.incarnation import Incarnation, write_incarnation
from streaming.pipeline.offsets import PartitionLag, committed_offsets, lags
from streaming.settings import Settings
from tests.streaming.history import commit_batch


@pytest.mark.parametrize(
    ("committed", "end", "begin", "lag"),
    [
        (7, 10, 0, 3),
        (10, 10, 0, 0),
        (None, 10, 0, 10),  # nothing is committed yet
        (None, 10, 4, 6),  # … and retention has removed four
        (2, 10, 4, 6),  # what retention has removed does not wait any more
        (7, 10, 4, 3),
        (7, 10, None, 3),
        (1, 10, 1, 9),
        (12, 10, 0, 0),  # the topic was made again
        (7, None, None, None),  # the broker does not answer
        (None, 0, 0, 0),
    ],
)
def test_lag_is_what_the_broker_still_has_and_no_table_holds(
    committed: int | None, end: int | None, begin: int | None, lag: int | None
) -> None:
    assert PartitionLag(0, committed, end=end, begin=begin).lag == lag


def test_every_partition_that_either_side_knows_is_listed() -> None:
    assert lags({1: 5, 0: 3}, {2: (0, 4), 1: (2, 9)}) == [
        PartitionLag(0, 3, end=None, begin=None),
        PartitionLag(1, 5, end=9, begin=2),
        PartitionLag(2, None, end=4, begin=0),
    ]


def test_partitions_are_listed_in_the_order_of_their_numbers() -> None:
    assert [one.partition for one in lags({8: 1, 16: 1}, {1: (0, 4), 9: (0, 1)})] == [1, 8, 9, 16]


def test_without_a_broker_only_what_is_committed_is_known() -> None:
    assert lags({0: 3}, None) == [PartitionLag(0, 3, end=None, begin=None)]
    assert lags({}, None) == []


def test_committed_is_one_past_the_last_message_of_all_batches(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    for number in range(11):
        commit_batch(settings, number, {0: (number, number + 1), 1: (2 * number, 2 * number + 2)})
    assert committed_offsets(settings) == ("images", {0: 11, 1: 22})


def test_a_batch_without_its_last_commit_does_not_count(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    commit_batch(settings, 0, {0: (0, 5)})
    commit_batch(settings, 1, {0: (5, 9)}, upto="quarantine")
    assert committed_offsets(settings) == ("images", {0: 5})


def test_batches_of_another_topic_do_not_count(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    commit_batch(settings, 0, {0: (0, 5)})
    other = settings.model_copy(update={"topic": "other"})
    assert committed_offsets(other) == ("other", {})
    commit_batch(other, 1, {0: (0, 2)})
    assert committed_offsets(other) == ("other", {0: 2})
    assert committed_offsets(settings) == ("images", {0: 5})


def test_the_latest_topic_of_a_name_is_the_one_that_the_tables_or_the_file_name(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    write_incarnation(settings, Incarnation("id", 1))
    commit_batch(settings.model_copy(update={"topic": "images~2"}), 0, {0: (0, 3)})
    assert committed_offsets(settings) == ("images~2", {0: 3}), "the file may be behind the tables"
    write_incarnation(settings, Incarnation("id", 3))
    assert committed_offsets(settings) == ("images~3", {}), "and the tables behind the file"


def test_a_table_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    commit_batch(settings, 0, {0: (0, 5)})
    for file in (settings.tables_dir / "batches" / "_delta_log").iterdir():
        file.write_text("{")
    with pytest.raises(ServiceError, match=r"table batches in .* cannot be read"):
        committed_offsets(settings)
