"""The model registry: immutable versions, and aliases that can be moved and keep their history.

A running stream follows `champion` before every micro-batch; `challenger` is a candidate under observation. The layout
of the store is described in `streaming.storage.registry_objects`.
"""

import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

from models.bundle import MANIFEST, Bundle, BundleFiles, BundleFolder, Manifest, read_bundle, read_manifest
from models.bundle_zip import write_zip
from models.errors import ModelError
from streaming.storage.alias_log import AliasLog
from streaming.storage.local_store import LocalStore
from streaming.storage.numbered import numbered
from streaming.storage.old_registry import migrate_registry
from streaming.storage.registry_objects import (
    BUNDLES,
    DELETED,
    FOLDER,
    VERSION_DIGITS,
    VERSIONS,
    Alias,
    Deleted,
    Move,
    Version,
    deleted_key,
    one_line,
    read_all,
    version_key,
)
from streaming.storage.store import Store, open_store

CHAMPION: Alias = "champion"
CHALLENGER: Alias = "challenger"
ALIASES: tuple[Alias, ...] = (CHAMPION, CHALLENGER)
ROLLBACK = "rollback"  # why an alias was moved back


def open_registry(home: Path | str) -> "Registry":
    """The registry of a home."""
    return Registry(open_store(home))


class Registry:
    """The versions and aliases in the store of a home; the registry of an earlier release is migrated at first use.

    Every method raises a ModelError if an object is damaged, and the ServiceErrors of the store.

    Attributes:
        place: path or URI, for messages.
    """

    def __init__(self, store: Store) -> None:
        self.place = f"{store.place}/{FOLDER}"
        self._opened = store

    @cached_property
    def _store(self) -> Store:
        migrate_registry(self._opened)
        return self._opened

    @cached_property
    def _log(self) -> AliasLog:
        return AliasLog(self._store)

    def versions(self) -> list[int]:
        """All registered versions that have not been deleted, oldest first."""
        deleted = {number for number, _ in numbered(self._store, DELETED, VERSION_DIGITS)}
        return [number for number in self.numbers() if number not in deleted]

    def numbers(self) -> list[int]:
        """The numbers of all versions that were ever registered, oldest first."""
        return sorted(number for number, _ in numbered(self._store, VERSIONS, VERSION_DIGITS))

    def find(self, bundle_sha256: str) -> int | None:
        """The version that was registered with this SHA-256; None if it is not here."""
        versions = self.versions()
        for version, data in zip(versions, read_all(self._store, map(version_key, versions)), strict=True):
            try:
                if data is not None and self._parsed(version, data).sha256 == bundle_sha256:
                    return version
            except ModelError:  # a damaged object does not affect the other versions
                continue
        return None

    def read(self, version: int) -> Bundle:
        """The bundle of a version, after checking its hashes and dimensions, and that it is the registered one.

        Raises:
            ModelError: the version does not exist, or its bundle is rejected.
        """
        return self.fetch(version, None)

    def fetch(self, version: int, into: Path | None) -> Bundle:
        """As `read`, but also copy all files to the local directory `into`, which is created.

        Raises:
            ModelError: the version does not exist, or its bundle is rejected.
        """
        registered = self._live(version)
        files = self._files(registered)
        bundle = read_bundle(files, into)
        _check_registered(version, registered, files, bundle.sha256)
        return bundle

    def export(self, version: int, file: Path) -> Bundle:
        """Export a version to a zip file of its bundle.

        Raises:
            ModelError: there is no such version, its bundle is rejected, or it exceeds the limit of a zip file (4 GiB).
        """
        with TemporaryDirectory(prefix="imagestream-") as scratch:
            folder = Path(scratch) / "bundle"
            bundle = self.fetch(version, folder)
            write_zip(folder, file)
        return bundle

    def manifest(self, version: int) -> Manifest:
        """The manifest of a version, which may be deleted; other files are not read.

        Raises:
            ModelError: the version does not exist, or its manifest is not the registered one.
        """
        registered = self._version(version)
        files = self._files(registered)
        manifest, sha256 = read_manifest(files)
        _check_registered(version, registered, files, sha256)
        return manifest

    def register(self, write: Callable[[Path], object]) -> int:
        """Create, check and store a bundle, and return its new version number.

        The version's own object is stored last, so that a version is either complete or absent.

        Args:
            write: writes the bundle to a local directory, which it creates.

        Raises:
            ModelError: the bundle is rejected, or other files are stored under its SHA-256.
        """
        with TemporaryDirectory(prefix="imagestream-") as scratch:
            folder = Path(scratch) / "bundle"
            write(folder)
            bundle = read_bundle(folder)
            for name in (*bundle.manifest.files, MANIFEST):
                key = f"{BUNDLES}/{bundle.sha256}/{name}"
                if not self._store.create(key, (folder / name).read_bytes()):
                    raise ModelError(
                        f"{self._store.place}/{key} is damaged: it should be the file with that name of the new "
                        "bundle; remove it and register the bundle again"
                    )
        content = Version.of(bundle.sha256).to_bytes()
        version = max(self.numbers(), default=0) + 1
        while not self._store.create(version_key(version), content):
            version += 1
        return version

    def keep(self, folder: Path, sha256: str) -> tuple[int, bool]:
        """The version of the bundle in `folder`, which is registered unless it is here, and whether it is new."""
        version = self.find(sha256)
        if version is not None:
            return version, False
        return self.register(lambda directory: shutil.move(folder, directory)), True

    def targets(self) -> dict[Alias, int | None]:
        """The version of each alias, None if it is not set; takes one request if there is no new move.

        An open registry notices new moves, but not the deletion of moves that it has read.
        """
        moves = self._log.follow()
        return {alias: _target(moves, alias) for alias in ALIASES}

    def target(self, alias: Alias) -> int | None:
        """The version of an alias, None if it was never set or was cleared."""
        return self.targets()[alias]

    def history(self, alias: Alias) -> list[Move]:
        """All moves of an alias, oldest first."""
        return _moves_of(self._log.follow(), alias)

    def promote(
        self, version: int, *, alias: Alias = CHAMPION, by: str, why: str, metrics: Mapping[str, float] | None = None
    ) -> Move:
        """Point an alias at a version whose bundle passes its checks.

        Raises:
            ModelError: the version does not exist, or its bundle is rejected.
        """
        bundle = self.read(version)
        kept = dict(bundle.manifest.metrics if metrics is None else metrics)
        return self._log.append(lambda moves: _move(moves, alias, version, by, why, kept))

    def rollback(self, *, alias: Alias = CHAMPION, by: str) -> Move:
        """Move an alias back to the version before its last move that was not itself a rollback.

        Rolling back twice goes back two versions.

        Raises:
            ModelError: there is no earlier version, or its bundle is rejected.
        """

        def move_back(moves: Sequence[Move]) -> Move:
            version = _before(moves, alias)
            return _move(moves, alias, version, by, ROLLBACK, self.read(version).manifest.metrics)

        return self._log.append(move_back)

    def clear(self, *, alias: Alias = CHALLENGER, by: str, why: str) -> Move:
        """Clear an alias; raises ModelError if it is the champion, which the stream requires, or is not set."""

        def move_away(moves: Sequence[Move]) -> Move:
            if alias == CHAMPION or _target(moves, alias) is None:
                found = "the stream needs it" if alias == CHAMPION else "it points at no version"
                raise ModelError(f"{alias} cannot be cleared: {found}")
            return _move(moves, alias, None, by, why, {})

        return self._log.append(move_away)

    def delete(self, version: int, *, by: str) -> None:
        """Delete the files of a version except its manifest; its number is not reused.

        Raises:
            ModelError: the version does not exist, or an alias points to it.
        """
        registered = self._live(version)
        self._check_unused(version)
        if not self._store.create(deleted_key(version), Deleted(sha256=registered.sha256, by=by, at=_now()).to_bytes()):
            return  # another process has deleted it
        try:
            self._check_unused(version)  # it may have been promoted in the meantime
        except ModelError:
            self._store.delete([deleted_key(version)])
            raise
        shared = any(self._version(other).path == registered.path for other in self.versions())
        if not shared:
            folder = f"{FOLDER}/{registered.path}"
            manifest = f"{folder}/{MANIFEST}"
            self._store.delete([stored.key for stored in self._store.list(folder) if stored.key != manifest])

    def _check_unused(self, version: int) -> None:
        pointing = [alias for alias, target in self.targets().items() if target == version]
        if pointing:
            raise ModelError(
                f"version {version} is the {pointing[0]}: promote another one, or clear the challenger, first"
            )

    def _live(self, version: int) -> Version:
        """A version that has not been deleted."""
        registered = self._version(version)
        data = self._store.get(deleted_key(version))
        if data is not None:
            deleted = Deleted.from_bytes(data, f"{self._store.place}/{deleted_key(version)}")
            raise ModelError(f"version {version} was deleted by {one_line(deleted.by)} at {deleted.at:%Y-%m-%d %H:%M}")
        return registered

    def _version(self, version: int) -> Version:
        data = self._store.get(version_key(version))
        if data is None:
            known = ", ".join(map(str, self.versions())) or "none"
            raise ModelError(f"there is no model version {version} in {self.place}; there are: {known}")
        return self._parsed(version, data)

    def _parsed(self, version: int, data: bytes) -> Version:
        key = version_key(version)
        found = Version.from_bytes(data, f"{self._store.place}/{key}")
        if found.path not in {f"bundles/{found.sha256}", str(version)}:
            raise ModelError(f"{self._store.place}/{key} is damaged: its path is {found.path[:100]!r}")
        return found

    def _files(self, version: Version) -> BundleFiles:
        if isinstance(self._store, LocalStore):  # in a folder, links and special files must be rejected
            return _LocalFiles(Path(self.place) / version.path)
        return _StoredFiles(self._store, f"{FOLDER}/{version.path}")


class _LocalFiles(BundleFolder):
    """A bundle in a local store, without temporary files of an interrupted registration."""

    def names(self) -> Collection[str]:
        return {name for name in super().names() if not name.startswith(".")}


class _StoredFiles:
    """A bundle in a bucket; implements `BundleFiles`."""

    def __init__(self, store: Store, folder: str) -> None:
        self._store = store
        self._folder = folder

    def __str__(self) -> str:
        return f"{self._store.place}/{self._folder}"

    @cached_property
    def _sizes(self) -> dict[str, int]:
        found = self._store.list(self._folder)
        return {stored.key.removeprefix(f"{self._folder}/"): stored.bytes for stored in found}

    def names(self) -> Collection[str]:
        return self._sizes.keys()

    def size(self, name: str) -> int:
        if name not in self._sizes:
            raise ModelError(f"{name} is missing")
        return self._sizes[name]

    def read(self, name: str) -> bytes:
        content = self._store.get(f"{self._folder}/{name}")
        if content is None:
            raise ModelError(f"{name} is missing")
        return content


def _check_registered(version: int, registered: Version, files: BundleFiles, sha256: str) -> None:
    if sha256 != registered.sha256:
        raise ModelError(
            f"bundle {files} is refused: its SHA-256 is {sha256}, version {version} was registered with "
            f"{registered.sha256}"
        )


def _moves_of(moves: Sequence[Move], alias: Alias) -> list[Move]:
    return [move for move in moves if move.alias == alias]


def _target(moves: Sequence[Move], alias: Alias) -> int | None:
    return next((move.version for move in reversed(moves) if move.alias == alias), None)


def _move(
    moves: Sequence[Move], alias: Alias, version: int | None, by: str, why: str, metrics: Mapping[str, float]
) -> Move:
    """The next move of an alias."""
    return Move(
        alias=alias, version=version, previous=_target(moves, alias), by=by, at=_now(), why=why, metrics=dict(metrics)
    )


def _before(moves: Sequence[Move], alias: Alias) -> int:
    """The target version of a rollback."""
    trail: list[int | None] = []  # the versions that led to the current one, without rolled back ones; None: cleared
    for move in _moves_of(moves, alias):
        if move.why == ROLLBACK and move.version in trail:
            while trail[-1] != move.version:
                trail.pop()
        elif not trail or trail[-1] != move.version:
            trail.append(move.version)
    earlier = [version for version in trail[:-1] if version not in {None, trail[-1]}]
    if not earlier:
        raise ModelError(f"{alias} has no earlier version to go back to")
    return earlier[-1]


def _now() -> datetime:
    return datetime.now(UTC)
