"""The rules of continuity at their limits, on topics as Kafka describes them."""

import json
from pathlib import Path

import pytest

from streaming.errors import ServiceError
from streaming.pipeline.continuity import Accept, Continuity, Start, check_checkpoint, check_topic, set_aside
from streaming.pipeline.incarnation import Incarnation
from streaming.pipeline.pin import OffsetRange
from streaming.platform.topic import Topic


def topic(begins: dict[int, int], ends: dict[int, int], id_: str = "one") -> Topic:
    return Topic("images", id_, begins, ends)


def checkpoint(directory: Path, ends: dict[int, int]) -> Path:
    """A checkpoint in which Spark has planned up to these offsets."""
    (directory / "offsets").mkdir(parents=True)
    offsets = {"images": {str(partition): end for partition, end in ends.items()}}
    (directory / "offsets" / "0").write_text(f"v1\n{{}}\n{json.dumps(offsets)}")
    (directory / "metadata").write_text('{"id":"query"}')
    return directory


# A micro-batch


def test_nothing_is_accepted_unless_the_user_says_so() -> None:
    assert Accept() == Accept(loss=False, new_partitions=False, new_topic=False)
    assert not Accept().from_tables
    assert not Accept(new_partitions=True).from_tables
    assert Accept(loss=True).from_tables
    assert Accept(new_topic=True).from_tables


def test_every_partition_of_a_batch_is_checked() -> None:
    continuity = Continuity("images", {0: 10, 1: 0, 2: 7})
    fine = [OffsetRange("images", 0, 10, 12), OffsetRange("images", 1, 0, 3), OffsetRange("images", 2, 7, 8)]
    assert continuity.check(fine) == []
    for number, wrong in ((1, OffsetRange("images", 1, 1, 3)), (2, OffsetRange("images", 2, 6, 8))):
        with pytest.raises(ServiceError, match=f"partition {number}: "):
            continuity.check([*fine[:number], wrong, *fine[number + 1 :]])


def test_one_message_repeated_or_missing_is_named_by_its_offset() -> None:
    continuity = Continuity("images", {0: 10})
    with pytest.raises(ServiceError, match="begins at offset 9, but 1 messages from there to 9 are committed"):
        continuity.check([OffsetRange("images", 0, 9, 12)])
    with pytest.raises(ServiceError, match="1 messages are missing, from offset 10 to 10; "):
        continuity.check([OffsetRange("images", 0, 11, 12)])


def test_accepted_loss_does_not_accept_a_repetition() -> None:
    continuity = Continuity("images", {0: 10, 1: 5}, Accept(loss=True))
    with pytest.raises(ServiceError, match="partition 0: the next batch begins at offset 9"):
        continuity.check([OffsetRange("images", 0, 9, 12)])
    batch = [OffsetRange("images", 0, 11, 12), OffsetRange("images", 1, 9, 12)]
    assert continuity.check(batch) == [OffsetRange("images", 0, 10, 11), OffsetRange("images", 1, 5, 9)]


def test_a_committed_batch_must_not_hold_more_than_was_committed() -> None:
    continuity = Continuity("images", {0: 10})
    continuity.check_whole([OffsetRange("images", 0, 5, 10)])
    continuity.check_whole([OffsetRange("images", 0, 5, 9)])
    with pytest.raises(ServiceError, match="plans a batch up to offset 11 that is committed up to 10 only"):
        continuity.check_whole([OffsetRange("images", 0, 5, 11)])
    with pytest.raises(ServiceError, match="partition 1: .* up to offset 1 that is committed up to 0 only"):
        continuity.check_whole([OffsetRange("images", 0, 5, 10), OffsetRange("images", 1, 0, 1)])


def test_a_committed_batch_moves_its_partitions_on_and_no_other() -> None:
    continuity = Continuity("images", {0: 10, 1: 4})
    continuity.advance([OffsetRange("images", 0, 10, 20), OffsetRange("images", 2, 0, 3)])
    assert continuity.committed == {0: 20, 1: 4, 2: 3}


# A checkpoint


def test_a_checkpoint_may_be_missing_where_nothing_is_committed_or_the_tables_are_followed(tmp_path: Path) -> None:
    missing = tmp_path / "spark"
    check_checkpoint(Continuity("images"), missing, resume=False)
    check_checkpoint(Continuity("images"), missing, resume=True)
    for accept in (Accept(loss=True), Accept(new_topic=True)):
        check_checkpoint(Continuity("images", {0: 10}, accept), missing, resume=False)
    for accept in (Accept(), Accept(new_partitions=True)):
        with pytest.raises(ServiceError, match="batches of topic 'images' up to 13 messages, but there is no check"):
            check_checkpoint(Continuity("images", {0: 10, 1: 3}, accept), missing, resume=False)


def test_a_checkpoint_that_is_there_is_followed(tmp_path: Path) -> None:
    there = checkpoint(tmp_path / "spark", {0: 10})
    check_checkpoint(Continuity("images", {0: 10}), there, resume=False)
    check_checkpoint(Continuity("images"), there, resume=False)
    with pytest.raises(ServiceError, match="begins a new checkpoint, but there is one in"):
        check_checkpoint(Continuity("images"), there, resume=True)


def test_a_checkpoint_is_renamed_to_the_first_free_name(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        (tmp_path / "spark").mkdir()
        (tmp_path / "spark" / "metadata").write_text(str(number))
        set_aside(tmp_path / "spark")
    set_aside(tmp_path / "spark")
    found = {path.name: (path / "metadata").read_text() for path in tmp_path.iterdir()}
    assert found == {"spark.aside-1": "1", "spark.aside-2": "2", "spark.aside-3": "3"}


# A topic


def test_a_stream_begins_after_what_is_committed_or_at_the_first_message_that_is_left() -> None:
    start = Start(Continuity("images", {0: 10, 1: 2, 3: 7}), Incarnation("one"), anew=False)
    found = topic({0: 0, 1: 5, 2: 3, 3: 4}, {0: 20, 1: 9, 2: 8, 3: 9})
    assert json.loads(start.starting_offsets(found)) == {"images": {"0": 10, "1": 5, "2": 3, "3": 7}}


def test_a_topic_that_was_never_read_is_read_from_where_it_begins(tmp_path: Path) -> None:
    continuity = Continuity("images")
    found = topic({0: 5, 1: 0}, {0: 9, 1: 0})
    assert check_topic(continuity, found, tmp_path / "spark", None) == Start(continuity, Incarnation("one"), anew=False)


def test_a_topic_that_begins_and_ends_where_the_tables_end_is_the_same(tmp_path: Path) -> None:
    continuity = Continuity("images", {0: 10})
    planned = checkpoint(tmp_path / "spark", {0: 10})
    start = check_topic(continuity, topic({0: 10}, {0: 10}), planned, Incarnation("one"))
    assert start == Start(continuity, Incarnation("one"), anew=False)


def test_one_message_that_retention_removed_is_a_loss(tmp_path: Path) -> None:
    planned = checkpoint(tmp_path / "spark", {0: 10})
    found = topic({0: 11}, {0: 20})
    with pytest.raises(ServiceError, match="1 messages are lost, from offset 10 to 10: "):
        check_topic(Continuity("images", {0: 10}), found, planned, None)
    with pytest.raises(ServiceError, match="1 messages are lost"):  # planned, and never committed
        check_topic(Continuity("images"), found, planned, None)
    assert check_topic(Continuity("images", {0: 10}, Accept(loss=True)), found, planned, None).anew


def test_what_the_tables_say_goes_before_what_spark_planned(tmp_path: Path) -> None:
    planned = checkpoint(tmp_path / "spark", {0: 30})  # of a batch that was not committed
    with pytest.raises(ServiceError, match="5 messages are lost, from offset 10 to 14"):
        check_topic(Continuity("images", {0: 10}), topic({0: 15}, {0: 40}), planned, None)


@pytest.mark.parametrize("ends", [{0: 9}, {}], ids=["shorter", "gone"])
def test_a_topic_that_does_not_reach_what_is_committed_was_made_again(tmp_path: Path, ends: dict[int, int]) -> None:
    what = "ends at offset 9" if ends else "is gone"
    found = topic(dict.fromkeys(ends, 0), ends)
    with pytest.raises(ServiceError, match=f"partition 0 {what}, but messages up to 9 are committed.*'images~2'"):
        check_topic(Continuity("images", {0: 10}), found, tmp_path / "spark", None)


def test_the_first_partition_that_does_not_reach_is_named(tmp_path: Path) -> None:
    found = topic({0: 0, 1: 0}, {0: 1, 1: 1})
    with pytest.raises(ServiceError, match="partition 0 ends at offset 1"):
        check_topic(Continuity("images", {1: 10, 0: 10}), found, tmp_path / "spark", None)


def test_a_topic_with_another_id_was_made_again_however_far_it_reaches(tmp_path: Path) -> None:
    planned = checkpoint(tmp_path / "spark", {0: 10})
    found = topic({0: 0}, {0: 100}, "two")
    with pytest.raises(ServiceError, match=r"made again \(id two, before one\): .*--accept-new-topic.*'images~3'"):
        check_topic(Continuity("images~2", {0: 10}, Accept(loss=True)), found, planned, Incarnation("one", 2))
    accept = Accept(new_topic=True)
    start = check_topic(Continuity("images~2", {0: 10}, accept), found, planned, Incarnation("one", 2))
    assert start == Start(Continuity("images~3", {}, accept), Incarnation("two", 3), anew=True)


def test_a_topic_that_goes_on_keeps_its_number(tmp_path: Path) -> None:
    continuity = Continuity("images~2", {0: 10})
    planned = checkpoint(tmp_path / "spark", {0: 10})
    start = check_topic(continuity, topic({0: 0}, {0: 12}), planned, Incarnation("one", 2))
    assert start == Start(continuity, Incarnation("one", 2), anew=False)


def test_partitions_are_new_only_to_a_checkpoint_that_knows_some(tmp_path: Path) -> None:
    found = topic({0: 0, 8: 0, 1: 0}, {0: 10, 8: 0, 1: 0})
    planned = checkpoint(tmp_path / "spark", {0: 10})
    with pytest.raises(ServiceError, match="has new partitions: 1, 8; "):
        check_topic(Continuity("images", {0: 10}), found, planned, None)
    accepted = Continuity("images", {0: 10}, Accept(new_partitions=True))
    assert check_topic(accepted, found, planned, None) == Start(accepted, Incarnation("one"), anew=False)
    resumed = Continuity("images", {0: 10})
    assert not check_topic(resumed, found, tmp_path / "none", None).anew
