"""The model registry: versions appear atomically and are immutable; aliases move and can be rolled back."""

import json
import multiprocessing
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from itertools import chain, count
from pathlib import Path
from threading import current_thread, main_thread
from uuid import uuid4
from zipfile import ZipFile

import pytest
from pydantic import ValidationError

from models.bundle import FILES, GOLDEN, MANIFEST, Bundle, read_bundle
from models.errors import ModelError
from streaming.registry import ROLLBACK, Registry, _StoredFiles, open_registry
from streaming.storage.alias_log import AliasLog
from streaming.storage.registry_objects import MAX_BYTES, Move, Version, deleted_key, move_key, version_key
from streaming.storage.store import Store, open_store
from tests.models.samples import copy_bundle, replace_file, tiny_bundle
from tests.object_store import BUCKET, ObjectStoreServer
from tests.streaming.killed import killed_at_each_step, processes_with_module_of
from tests.streaming.small_models import bundle_folder
from tests.streaming.stores import Elsewhere


@pytest.fixture
def bundle_dir(tmp_path: Path) -> Path:
    """A minimal valid bundle: the registry does not read its files."""
    return tiny_bundle(tmp_path / "bundle")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture(params=[open_store, Elsewhere], ids=["local", "elsewhere"])
def store(request: pytest.FixtureRequest, home: Path) -> Store:
    opened: Store = request.param(home)
    return opened


@pytest.fixture
def registry(store: Store) -> Registry:
    return Registry(store)


def register(registry: Registry, bundle: Path, times: int = 1) -> list[int]:
    return [registry.register(lambda directory: copy_bundle(bundle, directory)) for _ in range(times)]


def files_below(home: Path) -> dict[str, bytes]:
    return {str(path.relative_to(home)): path.read_bytes() for path in home.rglob("*") if path.is_file()}


# --- versions


def test_empty_registry_has_no_versions_and_creates_no_files(registry: Registry, home: Path) -> None:
    assert registry.versions() == []
    assert registry.target("champion") is None
    assert registry.history("champion") == []
    assert registry.find("0" * 64) is None
    with pytest.raises(ModelError, match=r"there is no model version 1 in .*home/models; there are: none"):
        registry.read(1)
    assert not home.exists()


def test_versions_are_numbered_in_order_and_read_back(registry: Registry, bundle_dir: Path) -> None:
    assert register(registry, bundle_dir, 11) == list(range(1, 12)) == registry.versions()
    bundle = read_bundle(bundle_dir)
    assert registry.read(3) == bundle
    assert registry.manifest(3) == bundle.manifest
    with pytest.raises(ModelError, match=r"there is no model version 12 .* there are: 1, 2, 3"):
        registry.read(12)


def test_version_is_found_by_its_hash(registry: Registry, bundle_dir: Path, tmp_path: Path) -> None:
    other = tiny_bundle(tmp_path / "other", metrics={"accuracy": 1.0})
    register(registry, bundle_dir)
    register(registry, other, 2)
    assert [registry.find(read_bundle(one).sha256) for one in (bundle_dir, other)] == [1, 2]
    assert registry.find("0" * 64) is None


def test_version_is_fetched_with_all_its_files(registry: Registry, bundle_dir: Path, tmp_path: Path) -> None:
    register(registry, bundle_dir)
    assert registry.fetch(1, tmp_path / "copy") == registry.read(1)
    assert files_below(tmp_path / "copy") == files_below(bundle_dir)


def test_version_is_exported_with_all_its_files(registry: Registry, bundle_dir: Path, tmp_path: Path) -> None:
    register(registry, bundle_dir)
    assert registry.export(1, tmp_path / "model.zip") == registry.read(1)
    with ZipFile(tmp_path / "model.zip") as file:
        file.extractall(tmp_path / "copy")
    assert files_below(tmp_path / "copy") == files_below(bundle_dir)


def test_bundle_that_is_registered_already_is_not_registered_again(
    registry: Registry, bundle_dir: Path, tmp_path: Path
) -> None:
    register(registry, bundle_dir)
    other = tiny_bundle(tmp_path / "other", metrics={"accuracy": 1.0})
    known, new = read_bundle(bundle_dir), read_bundle(other)
    assert registry.keep(bundle_dir, known.sha256) == (1, False)
    assert registry.keep(other, new.sha256) == (2, True)
    assert (registry.versions(), registry.read(2)) == ([1, 2], new)
    assert not other.exists(), "it was moved, not copied"


def test_versions_with_equal_contents_share_their_files(registry: Registry, bundle_dir: Path, home: Path) -> None:
    register(registry, bundle_dir)
    before = {path.name: path.stat().st_ino for path in bundle_folder(home, 1).iterdir()}
    assert before.keys() == FILES | {MANIFEST}
    assert register(registry, bundle_dir) == [2]
    assert bundle_folder(home, 2) == bundle_folder(home, 1)
    assert {path.name: path.stat().st_ino for path in bundle_folder(home, 1).iterdir()} == before


def test_failed_registration_leaves_no_files(registry: Registry, bundle_dir: Path, home: Path) -> None:
    def fail(directory: Path) -> None:
        copy_bundle(bundle_dir, directory)
        raise OSError("disk full")

    def corrupt(directory: Path) -> None:
        replace_file(copy_bundle(bundle_dir, directory), GOLDEN, b"")

    with pytest.raises(OSError, match="disk full"):
        registry.register(fail)
    with pytest.raises(ModelError, match=f"{GOLDEN} has SHA-256"):
        registry.register(corrupt)
    with pytest.raises(ModelError, match="not a regular file"):
        registry.register(lambda directory: directory.mkdir())
    assert registry.versions() == []
    assert not home.exists()


def register_many(home: Path, bundle: Path, start: "multiprocessing.synchronize.Barrier") -> None:
    start.wait()
    register(open_registry(home), bundle, 4)


def in_three_processes(target: Callable[..., None], *arguments: object) -> None:
    """Run `target` in three processes at once; its last argument is a barrier for the start."""
    context = processes_with_module_of(target)
    start = context.Barrier(3)
    processes = [context.Process(target=target, args=(*arguments, start)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0, 0, 0]


def test_concurrent_registrations_get_distinct_versions(home: Path, bundle_dir: Path) -> None:
    """Also if all of them register the same content."""
    in_three_processes(register_many, home, bundle_dir)
    registry = open_registry(home)
    assert registry.versions() == list(range(1, 13))
    assert {registry.read(version).sha256 for version in registry.versions()} == {read_bundle(bundle_dir).sha256}


def test_taken_number_that_is_not_listed_yet_is_not_reused(home: Path, bundle_dir: Path, tmp_path: Path) -> None:
    """As in a concurrent registration: the version of the other process is not listed yet."""
    store = Elsewhere(home)
    registry = Registry(store)
    register(registry, bundle_dir, 2)
    store.unlisted = {version_key(1), version_key(2)}
    other = tiny_bundle(tmp_path / "other", metrics={"accuracy": 1.0})
    assert register(registry, other) == [3]
    shas = [registry.read(version).sha256 for version in (1, 2, 3)]
    assert shas == [read_bundle(one).sha256 for one in (bundle_dir, bundle_dir, other)]


def register_one(home: Path) -> None:
    open_registry(home).register(lambda directory: shutil.copytree(home.parent / "bundle", directory))


def test_number_after_all_taken_ones_is_used(
    registry: Registry, bundle_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(registry, bundle_dir, 3)
    monkeypatch.setattr(registry, "numbers", list)  # a listing without the latest objects
    assert register(registry, bundle_dir) == [4]


def test_killed_registration_leaves_no_version_and_can_be_repeated(bundle_dir: Path, tmp_path: Path) -> None:
    numbers = count()
    sha256, killed = read_bundle(bundle_dir).sha256, 0
    for home in killed_at_each_step(register_one, lambda: tmp_path / f"home-{next(numbers)}"):
        killed += 1
        registry = open_registry(home)
        assert registry.versions() == []
        assert registry.find(sha256) is None
        assert register(registry, bundle_dir) == [1]
        assert registry.read(1).sha256 == sha256
    assert killed == len(FILES) + 2, "one kill before each file, the manifest and the version"


def test_existing_file_of_a_new_version_is_not_overwritten(registry: Registry, store: Store, bundle_dir: Path) -> None:
    key = f"models/bundles/{read_bundle(bundle_dir).sha256}/{GOLDEN}"
    store.put(key, b"other")
    with pytest.raises(ModelError, match=rf"{key} is damaged: .*; remove it and register the bundle again"):
        register(registry, bundle_dir)
    assert (registry.versions(), store.get(key)) == ([], b"other")


def test_only_objects_with_a_version_number_are_versions(registry: Registry, store: Store, bundle_dir: Path) -> None:
    register(registry, bundle_dir)
    for name in ("7.json", "0000007.json", "000000007.json", "00000007", "00000000.json", "x.json", "a/00000007.json"):
        store.put(f"models/versions/{name}", b"{}")
    assert registry.versions() == [1]
    with pytest.raises(ModelError, match=r"there is no model version 7 .* there are: 1$"):
        registry.read(7)
    for number in (-1, 10**9, 10**30):
        with pytest.raises(ModelError, match=f"there is no model version {number} "):
            registry.read(number)


def test_version_number_may_exceed_its_padding(registry: Registry, store: Store, bundle_dir: Path) -> None:
    register(registry, bundle_dir)
    content = store.get(version_key(1))
    assert content is not None
    store.put(version_key(99_999_999), content)
    assert register(registry, bundle_dir) == [100_000_000]
    assert registry.versions() == [1, 99_999_999, 100_000_000]
    assert registry.read(100_000_000) == registry.read(1)


# --- altered versions


def alter(store: Store, bundle_sha256: str, name: str, content: bytes) -> None:
    store.put(f"models/bundles/{bundle_sha256}/{name}", content)


@pytest.mark.parametrize("name", [*sorted(FILES), MANIFEST])
def test_version_with_an_altered_file_is_refused(
    registry: Registry, store: Store, bundle_dir: Path, tmp_path: Path, name: str
) -> None:
    register(registry, bundle_dir)
    sha256 = registry.read(1).sha256
    alter(store, sha256, name, (bundle_dir / name).read_bytes() + b" ")
    for read in (registry.read, lambda version: registry.fetch(version, tmp_path / "copy")):
        with pytest.raises(ModelError, match=rf"bundle .*models/bundles/{sha256} is refused: "):
            read(1)


def test_version_with_an_extra_or_missing_file_is_refused(registry: Registry, store: Store, bundle_dir: Path) -> None:
    register(registry, bundle_dir)
    sha256 = registry.read(1).sha256
    alter(store, sha256, "extra.pkl", b"more")
    with pytest.raises(ModelError, match=r"expected the files .* found .*extra.pkl"):
        registry.read(1)
    store.delete([f"models/bundles/{sha256}/{name}" for name in ("extra.pkl", GOLDEN)])
    with pytest.raises(ModelError, match=r"expected the files .* found"):
        registry.read(1)
    store.delete([f"models/bundles/{sha256}/{MANIFEST}"])
    for read in (registry.read, registry.manifest):
        with pytest.raises(ModelError, match=rf"{MANIFEST} is (missing|not a regular file)"):
            read(1)


def test_file_removed_while_its_bundle_is_read_is_reported(registry: Registry, store: Store, bundle_dir: Path) -> None:
    register(registry, bundle_dir)
    folder = f"models/bundles/{registry.read(1).sha256}"
    files = _StoredFiles(store, folder)
    assert files.size(GOLDEN) == len(files.read(GOLDEN))
    store.delete([f"{folder}/{GOLDEN}"])
    with pytest.raises(ModelError, match=f"^{GOLDEN} is missing$"):
        files.read(GOLDEN)


def test_replaced_bundle_of_a_version_is_refused(
    registry: Registry, store: Store, bundle_dir: Path, tmp_path: Path
) -> None:
    register(registry, bundle_dir)
    registry.promote(1, by="ada", why="first")
    sha256 = registry.read(1).sha256
    other = tiny_bundle(tmp_path / "other", metrics={"accuracy": 1.0})
    for path in other.iterdir():
        alter(store, sha256, path.name, path.read_bytes())
    for read in (
        lambda: registry.read(1),
        lambda: registry.manifest(1),
        lambda: registry.promote(1, by="ada", why="again"),
    ):
        with pytest.raises(ModelError, match=rf"/{sha256} is refused: its SHA-256 is \w+, version 1 was registered"):
            read()
    assert len(registry.history("champion")) == 1


@pytest.mark.parametrize("name", [MANIFEST, GOLDEN])
def test_link_in_a_local_bundle_is_refused(home: Path, bundle_dir: Path, name: str) -> None:
    registry = open_registry(home)
    register(registry, bundle_dir)
    path = bundle_folder(home, 1) / name
    path.unlink()
    path.symlink_to(bundle_dir / name)
    with pytest.raises(ModelError, match=f"{name} is not a regular file"):
        registry.read(1)
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(ModelError, match=f"{name} is not a regular file"):
        registry.read(1)


SHA = "5" * 64
VALID = {"sha256": SHA, "path": f"bundles/{SHA}"}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"sha256": ' + b"1" * 5_000 + b"}",
        json.dumps(VALID).encode() + b" " * MAX_BYTES,
        json.dumps(VALID | {"path": 1}).encode(),
        json.dumps(VALID | {"sha256": None}).encode(),
        json.dumps(VALID | {"sha256": "5" * 63}).encode(),
        json.dumps(VALID | {"sha256": "../" * 21 + "x"}).encode(),
        json.dumps({"path": "1"}).encode(),
        json.dumps(VALID | {"more\nlines": 1}).encode(),
        json.dumps(VALID | {"path": "../.."}).encode(),
        json.dumps(VALID | {"path": f"../models/bundles/{SHA}"}).encode(),
        json.dumps(VALID | {"path": "/etc"}).encode(),
        json.dumps(VALID | {"path": ""}).encode(),
        json.dumps(VALID | {"path": "2"}).encode(),
        json.dumps(VALID | {"path": "bundles/" + "6" * 64}).encode(),
        json.dumps(VALID | {"path": "a\nb" * 100_000}).encode(),
    ],
    ids=lambda content: repr(content[:60]),
)
def test_hostile_version_is_refused_in_one_line_and_hides_no_other(
    registry: Registry, store: Store, bundle_dir: Path, content: bytes
) -> None:
    register(registry, bundle_dir, 2)
    sha256 = registry.read(2).sha256
    store.put(version_key(1), content)
    for read in (registry.read, registry.manifest, lambda version: registry.promote(version, by="ada", why="first")):
        with pytest.raises(ModelError, match=r"models/versions/00000001\.json is damaged: .") as caught:
            read(1)
        assert len(str(caught.value).splitlines()) == 1
        assert len(str(caught.value)) < 500
    assert registry.find(sha256) == 2
    assert registry.read(2).sha256 == sha256


# --- objects


def test_object_is_indented_json_and_its_fields_do_not_change() -> None:
    version = Version(sha256=SHA, path="1", nonce="n")
    data = version.to_bytes()
    assert data.decode() == f'{{\n  "sha256": "{SHA}",\n  "path": "1",\n  "nonce": "n"\n}}\n'
    assert Version.from_bytes(data, "it") == version
    with pytest.raises(ValidationError, match="frozen"):
        version.path = "2"


def test_object_has_at_most_a_mebibyte() -> None:
    data = json.dumps(VALID).encode()
    assert Version.from_bytes(data.ljust(1024**2), "it").sha256 == SHA
    with pytest.raises(ModelError, match="it is damaged: it has 1,048,577 bytes, more than the 1,048,576 allowed"):
        Version.from_bytes(data.ljust(1024**2 + 1), "it")


def test_first_problem_of_an_object_is_named_in_at_most_200_characters() -> None:
    with pytest.raises(ModelError, match="^it is damaged: sha256: "):
        Version.from_bytes(b"{}", "it")
    with pytest.raises(ModelError) as caught:
        Version.from_bytes(json.dumps({"a" * 300: 1, **VALID}).encode(), "it")
    assert str(caught.value) == "it is damaged: " + "a" * 200


@pytest.mark.parametrize("metric", [float("nan"), float("inf")])
def test_move_has_only_finite_metrics(metric: float) -> None:
    with pytest.raises(ValidationError, match="finite number"):
        Move(
            alias="champion", version=1, previous=None, by="ada", at=datetime.now(UTC), why="", metrics={"loss": metric}
        )


# --- aliases


def test_promotion_moves_the_alias_and_records_the_move(registry: Registry, store: Store, bundle_dir: Path) -> None:
    register(registry, bundle_dir, 2)
    registry.promote(1, by="ada", why="the first model", metrics={"accuracy": 0.5})
    move = registry.promote(2, by="bob", why="better")
    assert registry.targets() == {"champion": 2, "challenger": None}
    assert (registry.target("champion"), registry.target("challenger")) == (2, None)
    assert Registry(store).history("champion")[1] == move
    first, second = registry.history("champion")
    assert (first.version, first.previous, first.by, first.metrics) == (1, None, "ada", {"accuracy": 0.5})
    assert (second.version, second.previous, second.why, second.metrics) == (2, 1, "better", {"accuracy": 0.9})
    assert first.at < second.at
    assert second.at.utcoffset() is not None


def test_aliases_move_independently(registry: Registry, bundle_dir: Path) -> None:
    register(registry, bundle_dir, 2)
    registry.promote(1, by="ada", why="first")
    registry.promote(2, alias="challenger", by="ada", why="under observation")
    assert registry.targets() == {"champion": 1, "challenger": 2}
    assert [move.version for move in registry.history("challenger")] == [2]
    with pytest.raises(ModelError, match="challenger has no earlier version"):
        registry.rollback(alias="challenger", by="ada")


def test_each_rollback_goes_back_one_version(registry: Registry, bundle_dir: Path) -> None:
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


def test_rollback_of_a_promotion_after_a_rollback_restores_its_predecessor(
    registry: Registry, bundle_dir: Path
) -> None:
    register(registry, bundle_dir, 3)
    for version in (1, 2):
        registry.promote(version, by="ada", why="better")
    registry.rollback(by="ada")
    registry.promote(3, by="ada", why="better")
    assert registry.rollback(by="ada").version == 1


def test_promotion_of_an_earlier_version_is_not_a_rollback(registry: Registry, bundle_dir: Path) -> None:
    register(registry, bundle_dir, 3)
    for version in (1, 2, 1):
        registry.promote(version, by="ada", why="better")
    assert registry.rollback(by="ada").version == 2
    assert registry.rollback(by="ada").version == 1
    registry.promote(3, by="ada", why=ROLLBACK)  # the reason alone does not make it a rollback
    assert registry.rollback(by="ada").version == 1


def test_challenger_is_rolled_back_by_its_own_moves(registry: Registry, bundle_dir: Path) -> None:
    register(registry, bundle_dir, 3)
    for version in (2, 3):
        registry.promote(1, by="ada", why="stays")
        registry.promote(version, alias="challenger", by="ada", why="tried")
    move = registry.rollback(alias="challenger", by="bob")
    assert (move.alias, move.version, move.previous, move.by, move.why) == ("challenger", 2, 3, "bob", ROLLBACK)
    assert registry.target("champion") == 1


def test_damaged_or_missing_version_cannot_be_promoted(
    registry: Registry, store: Store, bundle_dir: Path, tmp_path: Path
) -> None:
    register(registry, bundle_dir)
    register(registry, tiny_bundle(tmp_path / "other", metrics={"accuracy": 1.0}))
    registry.promote(1, by="ada", why="first")
    alter(store, registry.read(2).sha256, MANIFEST, b"{}")
    with pytest.raises(ModelError, match=r"bundle .*models/bundles/\w+ is refused: manifest\.json: backbone: Field"):
        registry.promote(2, by="ada", why="better")
    with pytest.raises(ModelError, match="there is no model version 7"):
        registry.promote(7, by="ada", why="better")
    assert registry.target("champion") == 1
    assert len(registry.history("champion")) == 1


def test_rollback_to_a_damaged_version_is_refused(
    registry: Registry, store: Store, bundle_dir: Path, tmp_path: Path
) -> None:
    register(registry, bundle_dir)
    register(registry, tiny_bundle(tmp_path / "other", metrics={"accuracy": 1.0}))
    for version in (1, 2):
        registry.promote(version, by="ada", why="better")
    alter(store, registry.read(1).sha256, GOLDEN, b"")
    with pytest.raises(ModelError, match=f"{GOLDEN} has SHA-256"):
        registry.rollback(by="ada")
    assert registry.target("champion") == 2


def test_given_metrics_replace_those_of_the_bundle_even_if_empty(registry: Registry, bundle_dir: Path) -> None:
    register(registry, bundle_dir)
    assert registry.promote(1, by="ada", why="first", metrics={}).metrics == {}
    assert registry.promote(1, by="ada", why="first").metrics == {"accuracy": 0.9}


def test_move_that_could_not_be_read_back_is_not_stored(registry: Registry, store: Store, bundle_dir: Path) -> None:
    register(registry, bundle_dir)
    for why in ("not UTF-8: \udcff", "long " * (MAX_BYTES // 5)):
        with pytest.raises(ModelError, match=r"^the move of the alias (cannot be stored|is damaged): .") as caught:
            registry.promote(1, by="ada", why=why)
        assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(ValueError, match="finite"):
        registry.promote(1, by="ada", why="first", metrics={"accuracy": float("nan")})
    assert store.get(move_key(1)) is None
    assert registry.promote(1, by="ada", why="first\nsecond ä \u2028").why == "first\nsecond ä \u2028"
    assert Registry(store).history("champion") == registry.history("champion")


def promote_many(home: Path, start: "multiprocessing.synchronize.Barrier") -> None:
    registry = open_registry(home)
    start.wait()
    for number in range(6):
        alias = "champion" if number % 3 else "challenger"
        registry.promote(1 + number % 2, alias=alias, by=str(multiprocessing.current_process().pid), why=f"{number}")


def test_concurrent_promotions_lose_no_move(home: Path, bundle_dir: Path) -> None:
    register(open_registry(home), bundle_dir, 2)
    in_three_processes(promote_many, home)
    registry = open_registry(home)
    champion, challenger = registry.history("champion"), registry.history("challenger")
    assert (len(champion), len(challenger)) == (12, 6)
    assert len({(move.by, move.why) for move in champion + challenger}) == 18
    for moves in (champion, challenger):
        assert [move.previous for move in moves] == [None, *(move.version for move in moves[:-1])]


def test_move_is_recomputed_after_a_concurrent_move(store: Store, registry: Registry, bundle_dir: Path) -> None:
    register(registry, bundle_dir, 3)
    registry.promote(1, by="ada", why="first")
    log, lengths = AliasLog(store), []

    def make(moves: Sequence[Move]) -> Move:
        lengths.append(len(moves))
        if len(moves) < 3:
            registry.promote(2, by="bob", why="meanwhile")
        return moves[-1].model_copy(update={"version": 3, "previous": moves[-1].version, "by": "ada"})

    assert log.append(make).previous == 2
    assert lengths == [1, 2, 3]
    assert [(move.version, move.by) for move in registry.history("champion")] == [
        (1, "ada"),
        (2, "bob"),
        (2, "bob"),
        (3, "ada"),
    ]


class OnThreads(Elsewhere):
    """Records the numbers of the moves that are read, and whether on another thread."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.read: list[tuple[int, bool]] = []

    def get(self, key: str) -> bytes | None:
        self.read.append((int(Path(key).stem), current_thread() is not main_thread()))
        return super().get(key)


def test_each_move_is_read_once_and_all_of_the_first_reading_in_parallel(home: Path) -> None:
    def move(moves: Sequence[Move]) -> Move:
        return Move(alias="champion", version=1, previous=None, by="ada", at=datetime.now(UTC), why=f"{len(moves)}")

    for _ in range(3):
        AliasLog(open_store(home)).append(move)
    store = OnThreads(home)
    log = AliasLog(store)
    assert [one.why for one in log.follow()] == ["0", "1", "2"]
    assert sorted(store.read) == [(1, True), (2, True), (3, True), (4, False)]
    store.read.clear()
    assert log.append(move).why == "3"
    assert [one.why for one in log.follow()] == ["0", "1", "2", "3"]
    assert store.read == [(4, False), (5, False)]


def test_reading_unchanged_aliases_takes_one_request(home: Path, bundle_dir: Path) -> None:
    store = Elsewhere(home)
    others, registry = open_registry(home), Registry(store)
    register(others, bundle_dir, 2)
    others.promote(1, by="ada", why="first")
    others.promote(2, alias="challenger", by="ada", why="second")
    assert registry.targets() == {"champion": 1, "challenger": 2}
    store.asked.clear()
    assert registry.targets() == {"champion": 1, "challenger": 2}
    assert store.asked == [("get", move_key(3))]
    others.promote(2, by="ada", why="third")
    store.asked.clear()
    assert registry.targets() == {"champion": 2, "challenger": 2}
    assert store.asked == [("get", move_key(3)), ("get", move_key(4))]


def test_gap_in_the_moves_is_reported(registry: Registry, store: Store, bundle_dir: Path) -> None:
    register(registry, bundle_dir)
    for number in range(4):
        registry.promote(1, by="ada", why=str(number))
    before = sorted(stored.key for stored in store.list("models"))
    for missing in (1, 3):
        content = store.get(move_key(missing))
        assert content is not None
        store.delete([move_key(missing)])
        for use in (lambda: Registry(store).targets(), lambda: registry.promote(1, by="ada", why="next")):
            with pytest.raises(ModelError, match=rf"{move_key(missing)} is missing, but later moves .* restore it"):
                use()
        store.put(move_key(missing), content)
    assert sorted(stored.key for stored in store.list("models")) == before
    assert Registry(store).target("champion") == 1


def test_move_follows_the_existing_ones_after_later_ones_were_removed(
    registry: Registry, store: Store, bundle_dir: Path
) -> None:
    """As after restoring a backup."""
    register(registry, bundle_dir, 3)
    for version in (1, 2, 3):
        registry.promote(version, by="ada", why=str(version))
    store.delete([move_key(2), move_key(3)])
    move = registry.promote(3, by="ada", why="next")
    assert (move.previous, registry.history("champion")) == (1, Registry(store).history("champion"))
    assert store.get(move_key(2)) is not None


def test_only_objects_with_a_number_are_moves(registry: Registry, store: Store, bundle_dir: Path) -> None:
    register(registry, bundle_dir)
    registry.promote(1, by="ada", why="first")
    for name in ("2.json", f"{0:020}.json", f"{7:021}.json", "notes.txt", f"old/{2:020}.json"):
        store.put(f"models/aliases/{name}", b"{")
    assert Registry(store).target("champion") == 1
    registry.promote(1, by="ada", why="second")
    assert [move.why for move in Registry(store).history("champion")] == ["first", "second"]


MOVE = {"alias": "champion", "version": 1, "previous": None, "by": "ada", "at": "2024-05-06T12:00:00Z", "why": "first"}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b"\xff\xfe",
        b"[" * 100_000,
        json.dumps(MOVE).encode() + b" " * MAX_BYTES,
        json.dumps(MOVE | {"version": "newest"}).encode(),
        json.dumps(MOVE | {"version": 0}).encode(),
        json.dumps(MOVE | {"version": -1}).encode(),
        json.dumps(MOVE | {"alias": "emperor"}).encode(),
        json.dumps(MOVE | {"alias": "x" * 100_000}).encode(),
        json.dumps(MOVE | {"shell\nrm": "rm"}).encode(),
        json.dumps(MOVE | {"at": "yesterday"}).encode(),
        json.dumps(MOVE | {"metrics": {"accuracy": float("nan")}}).encode(),
    ],
    ids=lambda content: repr(content[:60]),
)
def test_hostile_move_is_refused_in_one_line_and_not_overwritten(
    registry: Registry, store: Store, bundle_dir: Path, content: bytes
) -> None:
    register(registry, bundle_dir)
    registry.promote(1, by="ada", why="first")
    store.put(move_key(2), content)
    for use in (
        lambda: Registry(store).targets(),
        registry.targets,
        lambda: registry.promote(1, by="ada", why="next"),
        lambda: registry.rollback(by="ada"),
    ):
        with pytest.raises(ModelError, match=rf"{move_key(2)} is damaged: .") as caught:
            use()
        assert len(str(caught.value).splitlines()) == 1
        assert len(str(caught.value)) < 500
    assert store.get(move_key(2)) == content
    store.put(move_key(2), json.dumps(MOVE).encode())
    assert registry.target("champion") == 1


def test_moves_are_immutable() -> None:
    move = Move.model_validate(MOVE)
    assert move.metrics == {}
    with pytest.raises(ValueError, match="frozen"):
        move.version = 2


def test_objects_are_indented_json_with_unique_nonces(registry: Registry, store: Store, bundle_dir: Path) -> None:
    register(registry, bundle_dir, 2)
    for _ in range(2):
        registry.promote(1, by="ada", why="first")
    for keys in ([version_key(1), version_key(2)], [move_key(1), move_key(2)]):
        contents = [store.get(key) or b"" for key in keys]
        texts = [content.decode() for content in contents]
        assert texts == [json.dumps(json.loads(text), indent=2) + "\n" for text in texts]
        assert len({json.loads(text)["nonce"] for text in texts}) == 2
    assert Version.from_bytes(store.get(version_key(1)) or b"", "it").path == f"bundles/{registry.read(1).sha256}"


def test_home_copied_to_a_bucket_is_the_same_registry(home: Path, bundle_dir: Path, tmp_path: Path) -> None:
    registry = open_registry(home)
    register(registry, bundle_dir, 2)
    registry.promote(2, by="ada", why="first")
    shutil.copytree(home, tmp_path / "copy")
    copy = Registry(Elsewhere(tmp_path / "copy"))
    found: Bundle = copy.read(2)
    assert (copy.versions(), copy.targets(), found) == (registry.versions(), registry.targets(), registry.read(2))


# --- in a bucket


def test_registry_in_a_bucket_works_like_a_local_one(
    object_store: ObjectStoreServer, bundle_dir: Path, tmp_path: Path
) -> None:
    store = open_store(f"s3://{BUCKET}/{uuid4().hex}", object_store.options)
    writers = [Registry(store) for _ in range(3)]
    with ThreadPoolExecutor(len(writers)) as pool:  # concurrently, with distinct numbers
        versions = list(pool.map(lambda writer: register(writer, bundle_dir, 2), writers))
        assert sorted(chain(*versions)) == [1, 2, 3, 4, 5, 6]
        list(pool.map(lambda writer: writer.promote(2, by="ada", why="at once"), writers))
    registry = Registry(store)
    assert registry.read(6) == registry.fetch(6, tmp_path / "copy") == read_bundle(bundle_dir)
    assert read_bundle(tmp_path / "copy") == read_bundle(bundle_dir)
    assert len(registry.history("champion")) == 3
    writers[0].promote(5, by="bob", why="better")
    assert registry.targets() == {"champion": 5, "challenger": None}
    assert registry.rollback(by="bob").version == 2
    assert writers[1].target("champion") == 2


# --- deletion


def test_deleted_version_keeps_its_manifest_and_number(
    registry: Registry, bundle_dir: Path, home: Path, tmp_path: Path
) -> None:
    other = tiny_bundle(tmp_path / "other", metrics={"accuracy": 1.0})
    register(registry, bundle_dir, 2)
    register(registry, other)
    manifest = registry.manifest(3)
    registry.delete(3, by="me")
    assert (registry.versions(), registry.numbers()) == ([1, 2], [1, 2, 3])
    assert registry.manifest(3) == manifest
    assert {path.name for path in bundle_folder(home, 3).iterdir()} == {MANIFEST}
    for use in (registry.read, lambda version: registry.promote(version, by="me", why="")):
        with pytest.raises(ModelError, match="version 3 was deleted by me at 20"):
            use(3)
    registry.delete(1, by="me")
    assert registry.read(2) == read_bundle(bundle_dir)  # with the same bundle, which is kept
    assert register(registry, other) == [4]
    assert registry.read(4) == read_bundle(other)


def test_version_with_an_alias_is_not_deleted(registry: Registry, bundle_dir: Path) -> None:
    register(registry, bundle_dir, 2)
    registry.promote(1, by="me", why="")
    registry.promote(2, alias="challenger", by="me", why="")
    for version, alias in ((1, "champion"), (2, "challenger")):
        with pytest.raises(ModelError, match=f"version {version} is the {alias}: promote another one"):
            registry.delete(version, by="me")
    with pytest.raises(ModelError, match="there is no model version 9"):
        registry.delete(9, by="me")
    assert registry.versions() == [1, 2]


def test_version_promoted_during_its_deletion_is_kept(
    registry: Registry, store: Store, bundle_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(registry, bundle_dir)
    create = store.create

    def create_late(key: str, data: bytes) -> bool:
        if key == deleted_key(1):
            Registry(store).promote(1, by="you", why="")
        return create(key, data)

    monkeypatch.setattr(store, "create", create_late)
    with pytest.raises(ModelError, match="version 1 is the champion"):
        registry.delete(1, by="me")
    assert (registry.versions(), store.get(deleted_key(1))) == ([1], None)
    assert registry.read(1) == read_bundle(bundle_dir)


def test_files_shared_with_one_of_several_versions_are_kept(
    registry: Registry, bundle_dir: Path, tmp_path: Path
) -> None:
    register(registry, bundle_dir, 2)
    register(registry, tiny_bundle(tmp_path / "other", metrics={"accuracy": 1.0}))
    registry.delete(1, by="me")
    assert registry.read(2) == read_bundle(bundle_dir)


def test_rollback_never_returns_to_the_current_version(registry: Registry, bundle_dir: Path) -> None:
    register(registry, bundle_dir, 2)
    registry.promote(1, alias="challenger", by="me", why="")
    registry.clear(by="me", why="")
    registry.promote(1, alias="challenger", by="me", why="")
    with pytest.raises(ModelError, match="challenger has no earlier version"):
        registry.rollback(alias="challenger", by="me")
    registry.promote(2, alias="challenger", by="me", why="")
    assert registry.rollback(alias="challenger", by="me").version == 1


def test_cleared_challenger_is_restored_by_rollback(registry: Registry, store: Store, bundle_dir: Path) -> None:
    register(registry, bundle_dir, 3)
    registry.promote(1, by="me", why="")
    with pytest.raises(ModelError, match="challenger cannot be cleared: it points at no version"):
        registry.clear(by="me", why="")
    with pytest.raises(ModelError, match="champion cannot be cleared: the stream needs it"):
        registry.clear(alias="champion", by="me", why="")
    for version in (1, 2):
        registry.promote(version, alias="challenger", by="me", why="")
    move = registry.clear(by="me", why="enough")
    assert (move.version, move.previous, registry.target("challenger")) == (None, 2, None)
    assert Registry(store).target("challenger") is None
    registry.promote(3, alias="challenger", by="me", why="")
    assert [registry.rollback(alias="challenger", by="me").version for _ in range(2)] == [2, 1]
    with pytest.raises(ModelError, match="challenger has no earlier version"):
        registry.rollback(alias="challenger", by="me")
