"""The lag of a partition."""

import pytest

from streaming.pipeline.offsets import PartitionLag, PartitionOffsets, lags


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
        (12, 10, 0, 0),  # the topic was recreated
        (7, None, None, None),  # the broker does not answer
        (None, 0, 0, 0),
    ],
)
def test_lag_is_what_the_broker_still_has_and_no_table_holds(
    committed: int | None, end: int | None, begin: int | None, lag: int | None
) -> None:
    assert PartitionLag("images", 0, committed, end=end, begin=begin).lag == lag


def test_every_partition_that_either_side_knows_is_listed() -> None:
    known = {("b", 2): PartitionOffsets(0, 4), ("b", 1): PartitionOffsets(2, 9, held=6)}
    assert lags({("b", 1): 5, ("a", 3): 3}, known) == [
        PartitionLag("a", 3, 3, end=None, begin=None),
        PartitionLag("b", 1, 5, end=9, begin=2, held=6),
        PartitionLag("b", 2, None, end=4, begin=0, held=0),
    ]


def test_partitions_are_listed_in_the_order_of_their_numbers() -> None:
    assert [
        one.partition
        for one in lags(
            {("a", 8): 1, ("a", 16): 1}, {("a", 1): PartitionOffsets(0, 4), ("a", 9): PartitionOffsets(0, 1)}
        )
    ] == [1, 8, 9, 16]


def test_without_a_broker_only_what_is_committed_is_known() -> None:
    assert lags({("a", 0): 3}, None) == [PartitionLag("a", 0, 3, end=None, begin=None)]
    assert lags({}, None) == []
