"""The model registry: immutable versions, and aliases that move atomically and keep their history.

    <root>/1/ 2/ …        bundles; a version is a directory that appeared by one rename
    <root>/1.sha256 …     what each was registered with, so that a bundle that was altered as a whole is found
    <root>/aliases.json   where each alias points, and every move it ever made; replaced by one rename

The running stream reads `champion` before every micro-batch; `challenger` is a candidate under observation.
"""

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from models.bundle import Bundle, BundleFolder, Manifest, read_bundle, read_manifest
from models.errors import ModelError

Alias = Literal["champion", "challenger"]
CHAMPION: Alias = "champion"
CHALLENGER: Alias = "challenger"
ALIASES: tuple[Alias, ...] = ("champion", "challenger")
ROLLBACK = "rollback"  # why an alias was moved back


class Move(BaseModel):
    """One move of an alias."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    alias: Alias
    version: Annotated[int, Field(gt=0)]
    previous: int | None
    by: str
    at: datetime
    why: str
    metrics: dict[str, float] = {}


class _Aliases(BaseModel):
    model_config = ConfigDict(extra="forbid")

    moves: list[Move]

    def target(self, alias: Alias) -> int | None:
        return next((move.version for move in reversed(self.moves) if move.alias == alias), None)


class Registry:
    """The versions and aliases under one directory, which need not exist yet."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def versions(self) -> list[int]:
        """Every registered version, oldest first."""
        if not self.root.is_dir():
            return []
        return sorted(int(path.name) for path in self.root.iterdir() if path.name.isdecimal() and path.is_dir())

    def find(self, bundle_sha256: str) -> int | None:
        """The version that was registered with this SHA-256; None if it is not here."""
        for version in self.versions():
            try:
                if self._digest(version).read_text(encoding="ascii").strip() == bundle_sha256:
                    return version
            except (OSError, UnicodeDecodeError):
                continue
        return None

    def path(self, version: int) -> Path:
        """The directory of a version.

        Raises:
            ModelError: there is no such version.
        """
        path = self.root / str(version)
        if not path.is_dir():
            known = ", ".join(map(str, self.versions())) or "none"
            raise ModelError(f"there is no model version {version} in {self.root}; there are: {known}")
        return path

    def read(self, version: int) -> Bundle:
        """The bundle of a version, with hashes and dimensions checked, and that it is the one that was registered.

        Raises:
            ModelError: there is no such version, or its bundle is refused.
        """
        bundle = read_bundle(self.path(version))
        try:
            registered = self._digest(version).read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(f"version {version} in {self.root} was not registered here: {error}") from error
        if bundle.sha256 != registered:
            raise ModelError(
                f"bundle {self.path(version)} is refused: its SHA-256 is {bundle.sha256}, version {version} was "
                f"registered with {registered}"
            )
        return bundle

    def manifest(self, version: int) -> Manifest:
        """The manifest of a version; its other files are not read.

        Raises:
            ModelError: there is no such version, or its manifest is damaged.
        """
        return read_manifest(BundleFolder(self.path(version)))[0]

    def register(self, write: Callable[[Path], object]) -> int:
        """Let `write` make a bundle in a directory of its own, then give it the next version number.

        The directory is made beside the versions and renamed into place, so a version is there whole or not at all.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".new-", dir=self.root))
        try:
            write(scratch / "bundle")
            bundle = read_bundle(scratch / "bundle")
            with self._locked():
                version = max(self.versions(), default=0) + 1
                self._digest(version).write_text(bundle.sha256 + "\n", encoding="ascii")
                (scratch / "bundle").rename(self.root / str(version))
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        return version

    def target(self, alias: Alias) -> int | None:
        """The version that an alias points to, if it was ever set."""
        return self._read_aliases().target(alias)

    def history(self, alias: Alias) -> list[Move]:
        """Every move of an alias, oldest first."""
        return [move for move in self._read_aliases().moves if move.alias == alias]

    def promote(
        self, version: int, *, alias: Alias = CHAMPION, by: str, why: str, metrics: Mapping[str, float] | None = None
    ) -> Move:
        """Point an alias at a version whose bundle passes its checks.

        Raises:
            ModelError: no such version, or its bundle is refused.
        """
        bundle = self.read(version)
        with self._locked():
            aliases = self._read_aliases()
            move = Move(
                alias=alias,
                version=version,
                previous=aliases.target(alias),
                by=by,
                at=datetime.now(UTC),
                why=why,
                metrics=dict(bundle.manifest.metrics if metrics is None else metrics),
            )
            self._write_aliases(_Aliases(moves=[*aliases.moves, move]))
        return move

    def rollback(self, *, alias: Alias = CHAMPION, by: str) -> Move:
        """Point an alias back at the version it left in its last move that was not itself a rollback.

        Rolling back twice goes two versions back.

        Raises:
            ModelError: there is nothing to go back to.
        """
        trail: list[int] = []  # the versions that led to today's, without those rolled back from
        for move in self.history(alias):
            if len(trail) > 1 and move.why == ROLLBACK and move.version == trail[-2]:
                trail.pop()
            elif not trail or trail[-1] != move.version:
                trail.append(move.version)
        if len(trail) < 2:  # noqa: PLR2004
            raise ModelError(f"{alias} has no earlier version to go back to")
        return self.promote(trail[-2], alias=alias, by=by, why=ROLLBACK)

    def _digest(self, version: int) -> Path:
        """Where the SHA-256 that a version was registered with is kept: beside the bundle, not in it."""
        return self.root / f"{version}.sha256"

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.root / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file is closed, also by a crash
            yield

    def _read_aliases(self) -> _Aliases:
        path = self.root / "aliases.json"
        try:
            return _Aliases.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return _Aliases(moves=[])
        except ValidationError as error:
            raise ModelError(f"{path} is damaged: {error.errors()[0]['msg']}") from error

    def _write_aliases(self, aliases: _Aliases) -> None:
        scratch = self.root / f".aliases-{os.getpid()}.json"
        with scratch.open("w", encoding="utf-8") as file:
            json.dump(aliases.model_dump(mode="json"), file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(self.root / "aliases.json")
