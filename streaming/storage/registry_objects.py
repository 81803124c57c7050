"""The objects of the registry in its store: one for each version, one for each move of an alias.

    models/bundles/<sha256>/FILE   the files of a bundle, stored before the version that refers to them
    models/versions/<n:08>.json    a version: the folder of its bundle, and the bundle's SHA-256
    models/aliases/<k:020>.json    the k-th move of an alias, k = 1, 2, …
    models/deleted/<n:08>.json     the deletion of version n, whose number is not reused

Each is created once and never changed. Several processes may create the same key, so each object contains a random
number: without it, two processes that store the same content would both take the number as theirs.
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
READ_AT_ONCE = 16  # parallel requests; hundreds of objects in a bucket take a second
MAX_BYTES = 1024**2  # of one object
SHOWN = 200  # characters of a problem in an error

Alias = Literal["champion", "challenger"]


class _Object(BaseModel):
    """The content of an object, as indented JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    TITLE: ClassVar[str]

    def to_bytes(self) -> bytes:
        """Serialise the content; raises ModelError if the result could not be read back."""
        try:
            data = self.model_dump_json(indent=2).encode() + b"\n"
        except ValueError as error:  # characters that UTF-8 cannot encode
            raise ModelError(f"{self.TITLE} cannot be stored: {one_line(str(error))}") from error
        self.from_bytes(data, self.TITLE)
        return data

    @classmethod
    def from_bytes(cls, data: bytes, place: str) -> Self:
        """Parse and validate the content.

        Raises:
            ModelError: it is damaged; the error names `place`.
        """
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
        sha256: of the bundle's manifest, which identifies the bundle.
        path: the folder of the bundle, relative to that of the registry.
        nonce: random.
    """

    TITLE = "the new version"

    sha256: Sha256
    path: str
    nonce: str = ""

    @classmethod
    def of(cls, sha256: str) -> Self:
        """A new version of a bundle whose files have been stored."""
        return cls(sha256=sha256, path=f"bundles/{sha256}", nonce=uuid4().hex)


class Deleted(_Object):
    """The deletion of a version. Its manifest is kept, since later versions were compared with it."""

    TITLE = "the deletion"

    sha256: Sha256
    by: str
    at: datetime


class Move(_Object):
    """One move of an alias; `version` is None if the alias was cleared."""

    TITLE = "the move of the alias"

    alias: Alias
    version: Annotated[int, Field(gt=0)] | None
    previous: int | None
    by: str
    at: datetime
    why: str
    metrics: dict[str, float] = {}


class LoggedMove(Move):
    """A stored move."""

    nonce: str = ""

    @property
    def move(self) -> Move:
        return Move.model_validate(self.model_dump(exclude={"nonce"}))


def version_key(version: int) -> str:
    """The key of a version's object."""
    return numbered_key(VERSIONS, version, VERSION_DIGITS)


def deleted_key(version: int) -> str:
    """The key of the object that marks a version as deleted."""
    return numbered_key(DELETED, version, VERSION_DIGITS)


def move_key(number: int) -> str:
    """The key of a move; numbers start at 1."""
    return numbered_key(ALIAS_LOG, number, MOVE_DIGITS)


def read_all(store: Store, keys: Iterable[str]) -> list[bytes | None]:
    """The bytes of each object, in the order of the keys; None for one that does not exist."""
    with ThreadPoolExecutor(READ_AT_ONCE) as pool:
        return list(pool.map(store.get, keys))


def one_line(text: str) -> str:
    """Untrusted text on one line and of limited length, for an error."""
    return " ".join(text.split())[:SHOWN]
