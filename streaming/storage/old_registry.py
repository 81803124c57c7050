"""The registry as earlier releases kept it in a local home, taken up where it is.

    models/1/ 2/ …        bundles
    models/1.sha256 …     what each was registered with
    models/aliases.json   every move of the aliases
    models/.lock          held while a version or a move was added

The bundles stay where they are. Each step creates an object with the same bytes on every try, so a process that is
killed on the way is followed by one that does all of it again; `aliases.json` is renamed at the end.
"""

import re
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from models.errors import ModelError
from streaming.storage.home import locked
from streaming.storage.registry_objects import FOLDER, LoggedMove, Move, Version, move_key, version_key
from streaming.storage.store import LocalStore, Store

ALIASES = "aliases.json"
LOCK = ".lock"
SHA256 = re.compile(rb"[0-9a-f]{64}")
NUMBER = re.compile(r"[1-9][0-9]{0,7}")


class _Aliases(BaseModel):
    model_config = ConfigDict(extra="forbid")

    moves: list[Move]


def take_up(store: Store) -> None:
    """Create the objects of the versions and moves that an earlier release left; nothing where there are none.

    Raises:
        ModelError: its aliases are damaged, the home cannot be read or written to, or both releases write to it.
    """
    if not isinstance(store, LocalStore):  # earlier releases had no other
        return
    root = Path(store.place) / FOLDER
    try:
        left = _is_left(root)
    except OSError as error:
        raise ModelError(f"cannot read {root} ({error.strerror}): choose another home with --home DIR") from error
    if not left:
        return
    try:
        with locked(root / LOCK):  # against a process of the earlier release
            if _is_left(root):
                _take_up(store, root)
    except OSError as error:
        raise ModelError(
            f"{root} has model versions of an earlier release, which cannot be taken up ({error.strerror}): "
            "run 'imagestream models list' once as a user who may write there"
        ) from error


def _is_left(root: Path) -> bool:
    return (root / ALIASES).exists() or bool(_versions(root))


def _versions(root: Path) -> dict[int, str]:
    """Version → SHA-256, of those that have no object yet."""
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
                if SHA256.fullmatch(digest):  # else no release can have registered it
                    found[int(path.name)] = digest.decode()
    return found


def _take_up(store: Store, root: Path) -> None:
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
            f"{store.place}/{FOLDER} was written to by this release and afterwards by an earlier one: stop all "
            f"processes of the earlier release, then move {ALIASES} and the folders that it added away; "
            f"{key} would be changed"
        )


def _read_moves(path: Path) -> list[Move]:
    try:
        return _Aliases.model_validate_json(path.read_bytes()).moves
    except FileNotFoundError:
        return []
    except ValidationError as error:
        raise ModelError(f"{path} is damaged: {error.errors()[0]['msg']}") from error
