"""The registry: versions that appear whole and never change, aliases that move and can be moved back."""

import fcntl
import json
import multiprocessing
import os
import shutil
from pathlib import Path

import pytest
from samples import copy_bundle, replace_file, tiny_bundle

from models.bundle import GOLDEN, MANIFEST, read_bundle
from models.errors import ModelError
from models.registry import ROLLBACK, Move, Registry


@pytest.fixture
def bundle_dir(tmp_path: Path) -> Path:
    """A sound bundle, as small as can be: the registry does not look into its files."""
    return tiny_bundle(tmp_path / "bundle")


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "models")


def register(registry: Registry, bundle: Path, times: int = 1) -> list[int]:
    return [registry.register(lambda directory: copy_bundle(bundle, directory)) for _ in range(times)]


def test_an_empty_registry_has_nothing_and_makes_nothing(registry: Registry) -> None:
    assert registry.versions() == []
    assert registry.target("champion") is None
    assert registry.history("champion") == []
    with pytest.raises(ModelError, match=r"there is no model version 1 in .*models; there are: none"):
        registry.read(1)
    assert not registry.root.exists()


def test_versions_are_numbered_in_order_and_read_back(registry: Registry, bundle_dir: Path) -> None:
    assert register(registry, bundle_dir, 11) == list(range(1, 12)) == registry.versions()
    assert registry.read(3).sha256 == read_bundle(bundle_dir).sha256
    with pytest.raises(ModelError, match=r"there is no model version 12 .* there are: 1, 2, 3"):
        registry.path(12)


def test_a_version_is_never_replaced(registry: Registry, bundle_dir: Path) -> None:
    register(registry, bundle_dir)
    before = {path.name: path.stat().st_ino for path in registry.path(1).iterdir()}
    assert register(registry, bundle_dir) == [2]
    assert {path.name: path.stat().st_ino for path in registry.path(1).iterdir()} == before


def test_a_write_that_fails_leaves_nothing(registry: Registry, bundle_dir: Path) -> None:
    def fails(directory: Path) -> None:
        copy_bundle(bundle_dir, directory)
        raise OSError("disk full")

    def spoils(directory: Path) -> None:
        replace_file(copy_bundle(bundle_dir, directory), GOLDEN, b"")

    with pytest.raises(OSError, match="disk full"):
        registry.register(fails)
    with pytest.raises(ModelError, match=f"{GOLDEN} has SHA-256"):
        registry.register(spoils)
    with pytest.raises(ModelError, match="not a regular file"):
        registry.register(lambda directory: directory.mkdir())
    assert registry.versions() == []
    assert [path for path in registry.root.iterdir() if path.name != ".lock"] == []


def register_many(root: Path, bundle: Path, start: "multiprocessing.synchronize.Barrier") -> None:
    start.wait()
    register(Registry(root), bundle, 4)


def test_processes_that_register_at_once_get_versions_of_their_own(registry: Registry, bundle_dir: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    start = spawn.Barrier(3)
    processes = [spawn.Process(target=register_many, args=(registry.root, bundle_dir, start)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert registry.versions() == list(range(1, 13))
    assert {registry.read(version).sha256 for version in registry.versions()} == {read_bundle(bundle_dir).sha256}


def test_promotion_moves_the_alias_and_keeps_who_when_and_from_what(registry: Registry, bundle_dir: Path) -> None:
    register(registry, bundle_dir, 2)
    registry.promote(1, by="ada", why="the first model", metrics={"accuracy": 0.5})
    move = registry.promote(2, by="bob", why="better")
    assert registry.target("champion") == 2
    assert registry.target("challenger") is None
    assert Registry(registry.root).history("champion")[1] == move
    first, second = registry.history("champion")
    assert (first.version, first.previous, first.by, first.metrics) == (1, None, "ada", {"accuracy": 0.5})
    assert (second.version, second.previous, second.why, second.metrics) == (2, 1, "better", {"accuracy": 0.9})
    assert first.at < second.at
    assert second.at.utcoffset() is not None


def test_aliases_move_apart(registry: Registry, bundle_dir: Path) -> None:
    register(registry, bundle_dir, 2)
    registry.promote(1, by="ada", why="first")
    registry.promote(2, alias="challenger", by="ada", why="under observation")
    assert (registry.target("champion"), registry.target("challenger")) == (1, 2)
    assert [move.version for move in registry.history("challenger")] == [2]
    with pytest.raises(ModelError, match="challenger has no earlier version"):
        registry.rollback(alias="challenger", by="ada")


def test_rolling_back_twice_goes_two_versions_back_and_no_further(registry: Registry, bundle_dir: Path) -> None:
    register(registry, bundle_dir, 3)
    with pytest.raises(ModelError, match="champion has no earlier version to go back to"):
        registry.rollback(by="ada")
    for version in (1, 2, 2, 3):
        registry.promote(version, by="ada", why="better")
    assert registry.rollback(by="bob").version == 2
    assert registry.rollback(by="bob").version == 1
    with pytest.raises(ModelError, match="champion has no earlier version to go back to"):
        registry.rollback(by="bob")
    assert registry.target("champion") == 1
    moves = registry.history("champion")
    assert [move.version for move in moves] == [1, 2, 2, 3, 2, 1]
    assert [move.why == ROLLBACK for move in moves] == [False] * 4 + [True] * 2


def test_a_version_promoted_after_a_rollback_goes_back_to_where_the_rollback_led(
    registry: Registry, bundle_dir: Path
) -> None:
    register(registry, bundle_dir, 3)
    for version in (1, 2):
        registry.promote(version, by="ada", why="better")
    registry.rollback(by="ada")
    registry.promote(3, by="ada", why="better")
    assert registry.rollback(by="ada").version == 1


def test_only_a_whole_version_that_is_there_can_be_promoted(registry: Registry, bundle_dir: Path) -> None:
    register(registry, bundle_dir, 2)
    registry.promote(1, by="ada", why="first")
    replace_file(registry.path(2), MANIFEST, b"{}")
    with pytest.raises(ModelError, match=r"bundle .*models/2 is refused: manifest\.json: backbone: Field required"):
        registry.promote(2, by="ada", why="better")
    with pytest.raises(ModelError, match="there is no model version 7"):
        registry.promote(7, by="ada", why="better")
    assert registry.target("champion") == 1
    assert len(registry.history("champion")) == 1


def test_no_rollback_to_a_version_that_was_damaged(registry: Registry, bundle_dir: Path) -> None:
    register(registry, bundle_dir, 2)
    for version in (1, 2):
        registry.promote(version, by="ada", why="better")
    replace_file(registry.path(1), GOLDEN, b"")
    with pytest.raises(ModelError, match=f"{GOLDEN} has SHA-256"):
        registry.rollback(by="ada")
    assert registry.target("champion") == 2


MOVE = {"alias": "champion", "version": 1, "previous": None, "by": "ada", "at": "2024-05-06T12:00:00Z", "why": "first"}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"moves": 3}',
        json.dumps({"moves": [MOVE | {"version": "newest"}]}),
        json.dumps({"moves": [MOVE | {"version": 0}]}),
        json.dumps({"moves": [MOVE | {"alias": "emperor"}]}),
        json.dumps({"moves": [MOVE | {"shell": "rm"}]}),
        json.dumps({"moves": [MOVE], "more": 1}),
    ],
)
def test_damaged_aliases_are_told_in_one_line_and_not_written_over(
    registry: Registry, bundle_dir: Path, content: str
) -> None:
    register(registry, bundle_dir)
    file = registry.root / "aliases.json"
    file.write_text(json.dumps({"moves": [MOVE]}))
    assert registry.target("champion") == 1
    file.write_text(content)
    with pytest.raises(ModelError, match=r"aliases\.json is damaged: ") as caught:
        registry.promote(1, by="ada", why="first")
    assert "\n" not in str(caught.value)
    assert file.read_text() == content


def test_only_directories_that_are_numbers_are_versions(registry: Registry, bundle_dir: Path) -> None:
    register(registry, bundle_dir)
    assert {path.name for path in registry.root.iterdir()} == {"1", "1.sha256", ".lock"}
    (registry.root / "7").touch()
    (registry.root / "notes").mkdir()
    assert registry.versions() == [1]
    with pytest.raises(ModelError, match="there is no model version 7"):
        registry.path(7)


def test_a_registry_is_made_with_the_folders_above_it(tmp_path: Path, bundle_dir: Path) -> None:
    assert register(Registry(tmp_path / "a" / "b" / "models"), bundle_dir) == [1]


def test_a_version_that_is_whole_and_another_than_was_registered_is_refused(
    registry: Registry, bundle_dir: Path, tmp_path: Path
) -> None:
    register(registry, bundle_dir)
    registry.promote(1, by="ada", why="first")
    other = tiny_bundle(tmp_path / "other", metrics={"accuracy": 1.0})
    shutil.rmtree(registry.path(1))
    copy_bundle(other, registry.root / "1")
    for read in (lambda: registry.read(1), lambda: registry.promote(1, by="ada", why="again")):
        with pytest.raises(ModelError, match=r"models/1 is refused: its SHA-256 is \w+, version 1 was registered with"):
            read()
    assert len(registry.history("champion")) == 1


@pytest.mark.parametrize("digest", [None, b"\xff\xfe"])
def test_a_version_without_what_it_was_registered_with_is_refused(
    registry: Registry, bundle_dir: Path, digest: bytes | None
) -> None:
    register(registry, bundle_dir)
    file = registry.root / "1.sha256"
    file.unlink() if digest is None else file.write_bytes(digest)
    with pytest.raises(ModelError, match="version 1 in .*models was not registered here: "):
        registry.read(1)


def test_a_version_promoted_by_hand_is_no_rollback(registry: Registry, bundle_dir: Path) -> None:
    register(registry, bundle_dir, 3)
    for version in (1, 2, 1):
        registry.promote(version, by="ada", why="better")
    assert registry.rollback(by="ada").version == 2
    assert registry.rollback(by="ada").version == 1
    registry.promote(3, by="ada", why=ROLLBACK)  # a reason alone makes no rollback either
    assert registry.rollback(by="ada").version == 1


def test_a_challenger_is_rolled_back_by_its_own_moves(registry: Registry, bundle_dir: Path) -> None:
    register(registry, bundle_dir, 3)
    for version in (2, 3):
        registry.promote(1, by="ada", why="stays")
        registry.promote(version, alias="challenger", by="ada", why="tried")
    move = registry.rollback(alias="challenger", by="bob")
    assert (move.alias, move.version, move.previous, move.by, move.why) == ("challenger", 2, 3, "bob", ROLLBACK)
    assert registry.target("champion") == 1


def test_metrics_that_were_given_replace_those_of_the_bundle_even_if_there_are_none(
    registry: Registry, bundle_dir: Path
) -> None:
    register(registry, bundle_dir)
    assert registry.promote(1, by="ada", why="first", metrics={}).metrics == {}
    assert registry.promote(1, by="ada", why="first").metrics == {"accuracy": 0.9}


def test_a_move_is_never_changed() -> None:
    move = Move.model_validate(MOVE)
    assert move.metrics == {}
    with pytest.raises(ValueError, match="frozen"):
        move.version = 2


def test_a_registry_that_somebody_else_changes_is_waited_for(
    registry: Registry, bundle_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock = fcntl.flock
    register(registry, bundle_dir)
    monkeypatch.setattr(fcntl, "flock", lambda file, operation: flock(file, operation | fcntl.LOCK_NB))
    with (registry.root / ".lock").open() as theirs:
        flock(theirs, fcntl.LOCK_EX)
        with pytest.raises(BlockingIOError):  # it would wait now
            register(registry, bundle_dir)
        with pytest.raises(BlockingIOError):
            registry.promote(1, by="ada", why="first")
    assert (registry.versions(), registry.history("champion")) == ([1], [])
    assert registry.promote(1, by="ada", why="first").version == 1


def test_aliases_are_on_disk_before_they_take_the_place_of_the_old_ones(
    registry: Registry, bundle_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(registry, bundle_dir, 2)
    registry.promote(1, by="ada", why="first")
    synced = []

    def fsync(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").read_text())
        assert registry.target("champion") == 1, "the old ones still hold"

    monkeypatch.setattr(os, "fsync", fsync)
    registry.promote(2, by="ada", why="second")
    written = (registry.root / "aliases.json").read_text()
    assert synced == [written]
    assert written == json.dumps(json.loads(written), indent=2), "a person can read it"
    assert not list(registry.root.glob(".aliases-*"))
