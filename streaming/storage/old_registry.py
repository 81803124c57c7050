"""Migrates the registry of earlier releases in a local home.

    models/1/ 2/ …        bundles
    models/1.sha256 …     the SHA-256 that each was registered with
    models/aliases.json   all moves of the aliases
    models/.lock          held while a version or a move was added

The bundles stay in place. Each step creates an object with the same bytes at every attempt, so an interrupted migration
can be repeated; `aliases.json` is renamed at the end.
"""

import re
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from models.errors import ModelError
from streaming.storage.home import lock
from streaming.storage.local_store import LocalStore
from streaming.storage.registry_objects import FOLDER, LoggedMove, Move, Version, move_key, version_key
from streaming.storage.store import Store

ALIASES = "aliases.json"
LOCK = ".lock"
SHA256 = re.compile(rb"[0-9a-f]{64}")
NUMBER = re.compile(r"[1-9][0-9]{0,7}")


class _Aliases(BaseModel):
    model_config = ConfigDict(extra="forbid")

    moves: list[Move]


def migrate_registry(store: Store) -> None:
    """Create the objects of the versions and moves of an earlier release, if there are any.

    Raises:
        ModelError: the aliases are damaged, the home cannot be read or written to, or both releases write to it.
    """
    if not isinstance(store, LocalStore):  # earlier releases had only local homes
        return
    root = Path(store.place) / FOLDER
    try:
        left = _is_present(root)
    except OSError as error:
        raise ModelError(f"cannot read {root} ({error.strerror}): choose another home with --home DIR") from error
    if not left:
        return
    try:
        with lock(root / LOCK):  # against a process of the earlier release
            if _is_present(root):
                _migrate(store, root)
    except OSError as error:
        raise ModelError(
            f"{root} has model versions of an earlier release, which cannot be migrated ({error.strerror}): "
            "run 'imagestream models list' once as a user with write access"
        ) from error


def _is_present(root: Path) -> bool:
    return (root / ALIASES).exists() or bool(_versions(root))


def _versions(root: Path) -> dict[int, str]:
    """Version → SHA-256, for versions without an object."""
    try:
        paths = list(root.iterdir())
    except FileNotFoundError:
        return {}
    found = {}
    for path in paths:
        if NUMBER.fullmatch(path.name) and path.is_dir():
            registered = root / f"{path.name}.sha256"
            version_object = root.parent / version_key(int(path.name))
            if registered.is_file() and not version_object.exists():
                digest = registered.read_bytes().strip()
                if SHA256.fullmatch(digest):  # otherwise no release has registered it
                    found[int(path.name)] = digest.decode()
    return found


def _migrate(store: Store, root: Path) -> None:
    moves = _read_moves(root / ALIASES)
    for version, sha256 in sorted(_versions(root).items()):
        _create(store, version_key(version), Version(sha256=sha256, path=str(version)).to_bytes())
    for number, move in enumerate(moves, start=1):
        _create(store, move_key(number), LoggedMove(**dict(move)).to_bytes())
    if (root / ALIASES).exists():
        (root / ALIASES).rename(root / f"{ALIASES}.old")


def _create(store: Store, key: str, content: bytes) -> None:
    if not store.create(key, content):
        raise ModelError(
            f"{store.place}/{FOLDER} was written to by this release and afterwards by an earlier one, so that {key} "
            f"would change: stop all processes of the earlier release, then move {ALIASES} and its new folders away"
        )


def _read_moves(path: Path) -> list[Move]:
    try:
        return _Aliases.model_validate_json(path.read_bytes()).moves
    except FileNotFoundError:
        return []
    except ValidationError as error:
        raise ModelError(f"{path} is damaged: {error.errors()[0]['msg']}") from error
