"""The objects that the registry keeps in its store: one for each version, one for each move of an alias.

    models/bundles/<sha256>/FILE   the files of a bundle, stored before the version that names them
    models/versions/<n:08>.json    a version: where its bundle is, and the SHA-256 that names it
    models/aliases/<k:020>.json    the move number k of an alias, k = 1, 2, …
    models/deleted/<n:08>.json     that version n was deleted, whose number is not given again

Each is created once and never changed. Several processes may create one key, so each object of ours holds a random
number: without it two that store the same content would both believe that the number is theirs.
"""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Annotated, ClassVar, Literal, Self
from uuid import uuid4

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from models.bundle import Sha256
from models.errors import ModelError
from streaming.storage.numbered import numbered_key
from streaming.storage.store import Store

FOLDER = "models"
BUNDLES = f"{FOLDER}/bundles"
VERSIONS = f"{FOLDER}/versions"
ALIAS_LOG = f"{FOLDER}/aliases"
DELETED = f"{FOLDER}/deleted"
VERSION_DIGITS, MOVE_DIGITS = 8, 20  # of the keys
READ_AT_ONCE = 16  # hundreds of objects in a bucket are read in a second
MAX_BYTES = 1024**2  # of one such object
SHOWN = 200  # characters of what is wrong with one

Alias = Literal["champion", "challenger"]


class _Object(BaseModel):
    """Content of an object, as JSON that a person can read."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    TITLE: ClassVar[str]

    def to_bytes(self) -> bytes:
        """The content as it is stored.

        Raises:
            ModelError: it could not be read back.
        """
        try:
            data = self.model_dump_json(indent=2).encode() + b"\n"
        except ValueError as error:  # characters that UTF-8 does not have
            raise ModelError(f"{self.TITLE} cannot be stored: {one_line(str(error))}") from error
        self.from_bytes(data, self.TITLE)
        return data

    @classmethod
    def from_bytes(cls, data: bytes, place: str) -> Self:
        """Raises a ModelError that names `place` where `data` is not such an object."""
        if len(data) > MAX_BYTES:
            raise ModelError(f"{place} is damaged: it has {len(data):,} bytes, more than the {MAX_BYTES:,} allowed")
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            first = error.errors()[0]
            where = "".join(f"{part}: " for part in first["loc"])
            raise ModelError(f"{place} is damaged: {one_line(where + first['msg'])}") from error


class Version(_Object):
    """A registered version.

    Attributes:
        sha256: names the bundle; that of its manifest.
        path: the folder of the bundle, below that of the registry.
    """

    TITLE = "the new version"

    sha256: Sha256
    path: str
    nonce: str = ""

    @classmethod
    def of(cls, sha256: str) -> Self:
        """A new version of a bundle whose files are stored."""
        return cls(sha256=sha256, path=f"bundles/{sha256}", nonce=uuid4().hex)


class Deleted(_Object):
    """That a version was deleted; its manifest stays, since later versions were compared with it in mind."""

    TITLE = "the deletion"

    sha256: Sha256
    by: str
    at: datetime


class Move(_Object):
    """One move of an alias; to no version where it was cleared."""

    TITLE = "the move of the alias"

    alias: Alias
    version: Annotated[int, Field(gt=0)] | None
    previous: int | None
    by: str
    at: datetime
    why: str
    metrics: dict[str, float] = {}


class LoggedMove(Move):
    """A move as it is stored."""

    nonce: str = ""

    @property
    def move(self) -> Move:
        return Move.model_validate(self.model_dump(exclude={"nonce"}))


def version_key(version: int) -> str:
    """The key of a version's object."""
    return numbered_key(VERSIONS, version, VERSION_DIGITS)


def deleted_key(version: int) -> str:
    """The key of the object that says that a version was deleted."""
    return numbered_key(DELETED, version, VERSION_DIGITS)


def move_key(number: int) -> str:
    """The key of the move `number`, from 1."""
    return numbered_key(ALIAS_LOG, number, MOVE_DIGITS)


def read_all(store: Store, keys: Iterable[str]) -> list[bytes | None]:
    """The bytes of each object, in the order of the keys; None for one that does not exist."""
    with ThreadPoolExecutor(READ_AT_ONCE) as pool:
        return list(pool.map(store.get, keys))


def one_line(text: str) -> str:
    """A text that may come from somebody else's file, as an error shows it."""
    return " ".join(text.split())[:SHOWN]
