"""Persistence of stages in Spark ML's layout: `metadata/` is one line of JSON, `data/` a Parquet table of files.

The files of a stage besides its Params (arrays as `.npz`, a flatbuffer, a manifest) are rows of name and content, whose
SHA-256 is in the metadata. Spark writes both parts, to any of its file systems; neither contains executable data such
as pickles.
"""

import hashlib
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, Generic, Self, TypeVar

import pyarrow as pa
from pyspark.ml.param import Params
from pyspark.ml.util import DefaultParamsReader, DefaultParamsWriter, MLReadable, MLReader, MLWritable, MLWriter
from pyspark.sql import functions as F  # noqa: N812  as Spark's own documentation writes it

from streaming.errors import DataError

MAX_BYTES = 1024**3
FILES_DDL = "name string, content binary"


class StoredStage(Params, MLReadable[Any], MLWritable):
    """A stage that consists of its Params and some files."""

    def write(self) -> "StageWriter":
        """Return a writer of the Params and files."""
        return StageWriter(self)

    @classmethod
    def read(cls) -> "StageReader[Self]":
        """Return a reader of saved stages."""
        return StageReader(cls)

    @abstractmethod
    def to_files(self) -> Mapping[str, bytes]:
        """Return its files by name."""

    @classmethod
    @abstractmethod
    def from_files(cls, files: Mapping[str, bytes]) -> Self:
        """Return a stage with these files and default Params."""


Stored = TypeVar("Stored", bound=StoredStage)


class StageWriter(MLWriter):
    """Writes the Params and files of a stage."""

    def __init__(self, stage: StoredStage) -> None:
        super().__init__()
        self._stage = stage

    def saveImpl(self, path: str) -> None:  # noqa: N802  Spark ML's name
        files = dict(sorted(self._stage.to_files().items()))
        hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
        DefaultParamsWriter.saveMetadata(self._stage, path, self.sparkSession, extraMetadata={"files": hashes})
        table = pa.table({"name": [*files], "content": pa.array([*files.values()], pa.binary())})
        self.sparkSession.createDataFrame(table).coalesce(1).write.parquet(f"{path}/data")


class StageReader(MLReader[Stored], Generic[Stored]):
    """Reads a saved stage and verifies its hashes."""

    def __init__(self, cls: type[Stored]) -> None:
        super().__init__()
        self._cls = cls

    def load(self, path: str) -> Stored:
        """Load the stage saved under `path`; raises ServiceError if it is another kind of stage, or was modified."""
        try:
            metadata = DefaultParamsReader.loadMetadata(path, self.sparkSession)
            expected = f"{self._cls.__module__}.{self._cls.__name__}"
            if metadata["class"] != expected:
                raise DataError(f"{path}: expected a saved {expected}, got {metadata['class']}")
            stage = self._cls.from_files(self._read_files(path, metadata["files"]))
            stage._resetUid(metadata["uid"])  # as pyspark's own readers do; there is no public method for it
            DefaultParamsReader.getAndSetParams(stage, metadata)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{path} is not a saved {self._cls.__name__}: {error}") from error
        return stage

    def _read_files(self, path: str, hashes: Mapping[str, str]) -> dict[str, bytes]:
        table = self.sparkSession.read.schema(FILES_DDL).parquet(f"{path}/data")
        size = table.agg(F.sum(F.length("content"))).collect()[0][0] or 0
        if size > MAX_BYTES:
            raise DataError(f"{path} has {size:,} bytes: expected at most {MAX_BYTES:,}")
        files = {row["name"]: bytes(row["content"]) for row in table.limit(len(hashes) + 1).collect()}
        found = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
        if found != dict(hashes):
            raise DataError(f"{path} was modified: its files do not match the SHA-256 in its metadata")
        return files
