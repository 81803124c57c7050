"""Stages on disk, as Spark ML lays them out: `metadata/` is one line of JSON, `data/` a Parquet table of files.

What a stage holds beside its Params (arrays as `.npz`, a flatbuffer, a manifest) is a row each: name and content, whose
SHA-256 stands in the metadata. Both parts go through Spark, so any file system that Spark writes to will do, and
neither holds anything that could execute: no pickles.
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
    """A stage that is its Params and some files."""

    def write(self) -> "StageWriter":
        """Writes the Params and the files."""
        return StageWriter(self)

    @classmethod
    def read(cls) -> "StageReader[Self]":
        """Reads what `write` wrote."""
        return StageReader(cls)

    @abstractmethod
    def to_files(self) -> Mapping[str, bytes]:
        """What it holds beside its Params."""

    @classmethod
    @abstractmethod
    def from_files(cls, files: Mapping[str, bytes]) -> Self:
        """A stage that holds this, with default Params."""


Stored = TypeVar("Stored", bound=StoredStage)


class StageWriter(MLWriter):
    """Writes Params and files."""

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
    """Reads what `StageWriter` wrote, and nothing that differs from it by a byte."""

    def __init__(self, cls: type[Stored]) -> None:
        super().__init__()
        self._cls = cls

    def load(self, path: str) -> Stored:
        """The stage saved under `path`.

        Raises:
            ServiceError: it is another kind of stage, or was altered; says where and how.
        """
        try:
            metadata = DefaultParamsReader.loadMetadata(path, self.sparkSession)
            expected = f"{self._cls.__module__}.{self._cls.__name__}"
            if metadata["class"] != expected:
                raise DataError(f"{path} holds a {metadata['class']}, expected {expected}")
            stage = self._cls.from_files(self._read_files(path, metadata["files"]))
            stage._resetUid(metadata["uid"])
            DefaultParamsReader.getAndSetParams(stage, metadata)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{path} is no saved {self._cls.__name__}: {error}") from error
        return stage

    def _read_files(self, path: str, hashes: Mapping[str, str]) -> dict[str, bytes]:
        table = self.sparkSession.read.schema(FILES_DDL).parquet(f"{path}/data")
        size = table.agg(F.sum(F.length("content"))).collect()[0][0] or 0
        if size > MAX_BYTES:
            raise DataError(f"{path} holds {size:,} bytes, more than the {MAX_BYTES:,} allowed")
        files = {row["name"]: bytes(row["content"]) for row in table.limit(len(hashes) + 1).collect()}
        found = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
        if found != dict(hashes):
            raise DataError(f"{path} was altered: its files are not those whose SHA-256 its metadata tells")
        return files
