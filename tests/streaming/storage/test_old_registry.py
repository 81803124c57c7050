"""Migration of a registry of an earlier release in place, despite interruptions."""

import fcntl
import json
import os
import shutil
from itertools import count
from pathlib import Path

import pytest

from models.bundle import GOLDEN, MANIFEST, read_bundle
from models.errors import ModelError
from streaming.registry import Registry, open_registry
from streaming.storage.registry_objects import Version, move_key, version_key
from tests.models.samples import copy_bundle, replace_file, tiny_bundle
from tests.streaming.killed import killed_at_each_step
from tests.streaming.stores import Elsewhere

MOVE = {"alias": "champion", "version": 1, "previous": None, "by": "ada", "at": "2024-05-06T12:00:00Z", "why": "first"}
MOVES = [
    MOVE,
    MOVE | {"version": 2, "alias": "challenger", "why": "ä\n", "metrics": {"accuracy": 0.1}},
    MOVE | {"version": 2, "previous": 1, "at": "2024-05-06T12:00:00.123456+02:00", "why": "better"},
]
ALTERED = tuple(f"{version}/{name}" for version in (1, 2) for name in (GOLDEN, MANIFEST))


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home of an earlier release with two versions and three alias moves."""
    models = tmp_path / "home" / "models"
    for version in (1, 2):
        bundle = tiny_bundle(tmp_path / f"bundle-{version}", metrics={"accuracy": version / 10})
        shutil.copytree(bundle, models / str(version))
        (models / f"{version}.sha256").write_text(read_bundle(bundle).sha256 + "\n", encoding="ascii")
    (models / "aliases.json").write_text(json.dumps({"moves": MOVES}, indent=2))
    (models / ".lock").touch()
    return tmp_path / "home"


def files_below(home: Path) -> dict[str, bytes]:
    return {str(path.relative_to(home)): path.read_bytes() for path in home.rglob("*") if path.is_file()}


def test_versions_and_moves_are_migrated_without_copying_bundles(home: Path, tmp_path: Path) -> None:
    before = files_below(home)
    registry = open_registry(home)
    assert registry.versions() == [1, 2]
    for version in (1, 2):
        assert registry.read(version) == read_bundle(tmp_path / f"bundle-{version}")
        assert registry.manifest(version).metrics == {"accuracy": version / 10}
        assert registry.find(registry.read(version).sha256) == version
    assert registry.targets() == {"champion": 2, "challenger": 2}
    assert [(move.version, move.previous, move.why) for move in registry.history("champion")] == [
        (1, None, "first"),
        (2, 1, "better"),
    ]
    after = files_below(home)
    added = {version_key(1), version_key(2), *(move_key(number) for number in (1, 2, 3))}
    assert after.keys() - before.keys() == added | {"models/aliases.json.old"}
    assert after["models/aliases.json.old"] == before.pop("models/aliases.json")
    assert {name: after[name] for name in before} == before
    assert json.loads(after[version_key(1)])["path"] == "1"


def test_migrated_registry_works_as_any_other(home: Path, tmp_path: Path) -> None:
    registry = open_registry(home)
    assert registry.rollback(by="bob").version == 1
    assert registry.register(lambda folder: copy_bundle(tmp_path / "bundle-1", folder)) == 3
    registry.promote(3, by="bob", why="again")
    before = files_below(home)
    again = open_registry(home)
    assert (again.versions(), again.target("champion")) == ([1, 2, 3], 3)
    assert files_below(home) == before
    elsewhere = Registry(Elsewhere(home))  # as after copying to a bucket
    assert [elsewhere.read(version) for version in (1, 2, 3)] == [again.read(version) for version in (1, 2, 3)]


def test_new_home_stays_empty(tmp_path: Path) -> None:
    assert open_registry(tmp_path / "new").versions() == []
    assert not (tmp_path / "new").exists()


def test_version_with_an_object_is_not_migrated_again(home: Path) -> None:
    path = home / version_key(1)
    path.parent.mkdir()
    sha256 = (home / "models" / "1.sha256").read_text().strip()
    path.write_bytes(Version(sha256=sha256, path="1", nonce="of a new registration").to_bytes())
    before = path.read_bytes()
    assert open_registry(home).versions() == [1, 2]
    assert path.read_bytes() == before


def test_home_without_a_promotion_is_migrated(home: Path) -> None:
    (home / "models" / "aliases.json").unlink()
    registry = open_registry(home)
    assert (registry.versions(), registry.target("champion")) == ([1, 2], None)
    assert not (home / "models" / "aliases.json.old").exists()


def migrate(home: Path) -> None:
    open_registry(home).versions()


def test_migration_killed_at_any_step_is_completed(home: Path, tmp_path: Path) -> None:
    old = files_below(home)
    numbers = count()
    uninterrupted = shutil.copytree(home, tmp_path / "uninterrupted")
    migrate(uninterrupted)
    killed = 0
    for copy in killed_at_each_step(migrate, lambda: shutil.copytree(home, tmp_path / f"copy-{next(numbers)}")):
        killed += 1
        left = files_below(copy)
        assert {name: left[name] for name in old} == old, "the files of the earlier release are unchanged"
        registry = open_registry(copy)
        assert (registry.versions(), registry.targets()) == ([1, 2], {"champion": 2, "challenger": 2})
        left = files_below(copy)
        assert {name: content for name, content in left.items() if "/." not in name} == {
            name: content for name, content in files_below(uninterrupted).items() if "/." not in name
        }
    assert killed == 2 + 3 + 1, "before each version, each move and the renaming"


@pytest.mark.parametrize("name", ALTERED)
def test_altered_bundle_is_refused(home: Path, name: str) -> None:
    path = home / "models" / name
    replace_file(path.parent, path.name, path.read_bytes() + b" ")
    registry, version = open_registry(home), int(name[0])
    with pytest.raises(ModelError, match=rf"bundle .*home/models/{version} is refused: "):
        registry.read(version)
    with pytest.raises(ModelError, match=rf"bundle .*home/models/{version} is refused: "):
        registry.promote(version, by="ada", why="again")
    registry.read(3 - version)


def test_valid_bundle_other_than_the_registered_one_is_refused(home: Path) -> None:
    shutil.rmtree(home / "models" / "1")
    shutil.copytree(home / "models" / "2", home / "models" / "1")
    with pytest.raises(ModelError, match=r"models/1 is refused: its SHA-256 is \w+, version 1 was registered with"):
        open_registry(home).read(1)


@pytest.mark.parametrize("digest", [None, b"", b"\xff\xfe", b"5" * 63, b"../" * 21 + b"x", b"5" * 64 + b"\n5"])
def test_unregistered_folder_is_not_a_version(home: Path, digest: bytes | None) -> None:
    file = home / "models" / "1.sha256"
    file.unlink() if digest is None else file.write_bytes(digest)
    registry = open_registry(home)
    assert registry.versions() == [2]
    with pytest.raises(ModelError, match=r"there is no model version 1 in .*; there are: 2"):
        registry.read(1)


def test_only_folders_with_a_number_are_versions(home: Path) -> None:
    models, digest = home / "models", (home / "models" / "1.sha256").read_text()
    for name in ("0", "03", "notes", "4 ", "٤", "9" * 9):
        (models / name).mkdir()
        (models / f"{name}.sha256").write_text(digest)
    (models / "5").touch()
    for name in ("5", "6"):  # an interrupted registration leaves no folder
        (models / f"{name}.sha256").write_text(digest)
    assert open_registry(home).versions() == [1, 2]


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
def test_damaged_aliases_are_reported_and_nothing_is_changed(home: Path, content: str) -> None:
    (home / "models" / "aliases.json").write_text(content)
    before = files_below(home)
    for use in (
        lambda: open_registry(home).versions(),
        lambda: open_registry(home).targets(),
        lambda: open_registry(home).promote(1, by="ada", why="first"),
    ):
        with pytest.raises(ModelError, match=r"aliases\.json is damaged: .") as caught:
            use()
        assert len(str(caught.value).splitlines()) == 1
    assert files_below(home) == before


def test_unwritable_home_is_reported_with_a_fix(home: Path) -> None:
    (home / "models" / ".lock").unlink()
    (home / "models" / ".lock").mkdir()  # unlike removed permissions, this also stops root
    with pytest.raises(ModelError, match=r"home/models has model versions of an earlier release, .* run 'imagestream"):
        open_registry(home).versions()


def test_home_that_is_not_a_folder_is_reported_with_a_fix(tmp_path: Path) -> None:
    (tmp_path / "home").touch()
    with pytest.raises(ModelError, match=r"^cannot read .*home/models \(Not a directory\): choose another home"):
        open_registry(tmp_path / "home").versions()


def test_migration_waits_for_a_process_of_the_earlier_release(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flock = fcntl.flock
    before = files_below(home)
    monkeypatch.setattr(fcntl, "flock", lambda file, operation: flock(file, operation | fcntl.LOCK_NB))
    with (home / "models" / ".lock").open() as lock:
        flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ModelError, match=os.strerror(11)):  # without LOCK_NB, it would block
            open_registry(home).versions()
    assert files_below(home) == before
    assert open_registry(home).versions() == [1, 2]


def test_later_move_of_the_earlier_release_is_reported_and_kept(home: Path) -> None:
    registry = open_registry(home)
    registry.targets()
    content = json.dumps({"moves": [MOVE | {"why": "made since"}]})
    (home / "models" / "aliases.json").write_text(content)
    before = files_below(home)
    with pytest.raises(ModelError, match=r"written to by this release and afterwards by an earlier one, .*aliases"):
        open_registry(home).targets()
    assert files_below(home) == before
    (home / "models" / "aliases.json").unlink()
    assert open_registry(home).target("champion") == 2
