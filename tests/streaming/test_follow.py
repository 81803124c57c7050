"""Following predictions from the table and from the answers topic: each once, resumable at every position."""

import json
from contextlib import closing
from itertools import islice, takewhile
from pathlib import Path

import pytest

from streaming.errors import ServiceError
from streaming.follow import Answer, Idle, follow, follow_settings
from streaming.jobs.rewrite import compact
from streaming.settings import Settings
from streaming.storage.table_log import open_delta
from tests.conftest import command_here
from tests.streaming.answered import BATCHES, EXPECTED, ROWS, begun, commit
from tests.streaming.schema_server import schema_server


@pytest.fixture(params=["table", "topic"])
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> Settings:
    """A home whose predictions are followed from the table, or from an answers topic with every batch."""
    return begun(Settings(home=tmp_path), request.getfixturevalue("broker") if request.param == "topic" else None)


def answers_after(settings: Settings, position: str, count: int) -> list[Answer]:
    """The next `count` answers; fails if more follow."""
    with closing(follow_settings(settings, position)) as answers:
        found: list[Answer] = []
        while len(found) < count:
            found += [one for one in [next(answers)] if isinstance(one, Answer)]
        rest = [*takewhile(lambda one: isinstance(one, Answer), answers)]
    assert not rest
    return found


def places(answers: list[Answer]) -> list[tuple[int, int]]:
    return [(answer.row["partition"], answer.row["offset"]) for answer in answers]


def test_each_prediction_is_returned_once_and_each_position_resumes(settings: Settings) -> None:
    commit(settings, 1, 2)
    compact(settings.place.table("predictions"), 10**9)  # a table version without new rows
    assert any(json.loads(line).get("remove") for line in _newest_entry(settings))
    commit(settings, 3, BATCHES)
    found = answers_after(settings, "earliest", len(EXPECTED))
    assert sorted(places(found)) == sorted(EXPECTED)
    assert len({answer.position for answer in found}) == len(found)
    for number in (0, 3, len(found) // 2, len(found) - 2):
        rest = answers_after(settings, found[number].position, len(found) - 1 - number)
        assert sorted(places(found[: number + 1]) + places(rest)) == sorted(EXPECTED)


def test_new_predictions_are_returned_as_they_are_committed(settings: Settings) -> None:
    commit(settings, 1, 1)
    with closing(follow_settings(settings)) as answers:
        idle = next(answers)
        assert isinstance(idle, Idle)
        commit(settings, 2, 2)
        found = [*islice((answer for answer in answers if isinstance(answer, Answer)), 2 * ROWS)]
    assert {answer.row["batch_id"] for answer in found} == {2}
    assert sorted(places(answers_after(settings, idle.position, 2 * ROWS))) == sorted(places(found))


def test_invalid_position_is_a_one_line_error(settings: Settings) -> None:
    commit(settings, 1, 1)
    topic = settings.answers_topic or "other"
    ahead = f"topic/{topic}/0:999999" if settings.answers_topic else "table/99/0"
    invalid = ["", "latest ", "table/1", "table/1/x", "topic/elsewhere/0:1", f"topic/{topic}/0:-1", "x" * 10_000, ahead]
    invalid.append("table/1/1" if settings.answers_topic else f"topic/{topic}/0:1")
    for position in invalid:
        with pytest.raises(
            ServiceError, match=r"^(expected earliest, latest or|offset 999999|table predictions has no)"
        ):
            next(follow_settings(settings, position))


def test_avro_answers_are_returned_as_the_json_of_the_table(tmp_path: Path, broker: Settings) -> None:
    with schema_server() as registry:
        avro = {"answers_format": "avro", "schema_registry": registry.url}
        settings = begun(Settings(home=tmp_path), broker, **avro)
        commit(settings, 1, 2)
        assert registry.subjects == {f"{settings.answers_topic}-value": {1}}
        values = {answer.value for answer in answers_after(settings, "earliest", 4 * ROWS - 2)}
    from_table = settings.model_copy(update={"answers_topic": None})
    assert {answer.value for answer in answers_after(from_table, "earliest", 4 * ROWS - 2)} == values
    without = settings.model_copy(update={"schema_registry": None})
    with pytest.raises(
        ServiceError, match=r"offset \d+ of partition .*: its schema is in a schema registry: set --schema-"
    ):
        answers_after(without, "earliest", 1)


def test_version_removed_from_the_log_is_a_one_line_error(tmp_path: Path) -> None:
    settings = begun(Settings(home=tmp_path), None)
    commit(settings, 1, 3)
    place = settings.place.table("predictions")
    open_delta(place).create_checkpoint()
    for version in (0, 1):
        Path(place, "_delta_log", f"{version:020}.json").unlink()
    assert {row["batch_id"] for row in (answer.row for answer in answers_after(settings, "earliest", 4 * ROWS))} == {
        2,
        3,
    }
    with pytest.raises(ServiceError, match="version 1 of table predictions is no longer in its log"):
        next(follow(tmp_path, after="table/1/0"))


def test_command_writes_json_lines_and_resumes_after_a_position(tmp_path: Path) -> None:
    settings = begun(Settings(home=tmp_path), None)
    commit(settings, 1, BATCHES)
    offsets, position = [], "earliest"
    for limit in (4, len(EXPECTED) - 4):
        arguments = ("--follow", "--after", position, "--limit", limit)
        code, out, err = command_here("--home", tmp_path, "predictions", *arguments)
        assert code == 0, err
        rows = [json.loads(line) for line in out.splitlines()]
        offsets += [(row["partition"], row["offset"]) for row in rows]
        position = rows[-1]["position"]
        assert f"continue with --after {position}" in err
    assert sorted(offsets) == sorted(EXPECTED)
    code, _, err = command_here("--home", tmp_path, "predictions", "--follow", "--watch", 1)
    assert code != 0
    assert "--follow writes JSON lines as they arrive: omit --" in err


def _newest_entry(settings: Settings) -> list[str]:
    place = settings.place.table("predictions")
    return (Path(place) / "_delta_log" / f"{open_delta(place).version():020}.json").read_text().splitlines()
