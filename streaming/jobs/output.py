"""Validates the output of an export, and its format, before the work starts, which may take hours."""

import tempfile
import uuid
from pathlib import Path, PurePosixPath
from typing import Literal, get_args

from streaming.errors import ConfigurationError, ConflictError, UsageError
from streaming.storage.home import LOG
from streaming.storage.store import open_store

FileFormat = Literal["csv", "parquet", "delta"]


def output_format(output: Path | str, given: FileFormat | None) -> FileFormat:
    """The requested format; by default that of the file's suffix, or a Delta table if there is no suffix.

    Raises:
        ServiceError: the suffix is unknown.
    """
    if given is not None:
        return given
    suffix = PurePosixPath(output).suffix.lower().removeprefix(".")
    for one in get_args(FileFormat):
        if suffix == one:
            known: FileFormat = one
            return known
    if suffix:
        raise UsageError(f"{output}: expected a name that ends in .csv or .parquet, or --format csv, parquet or delta")
    return "delta"


def check_output(output: Path | str, format_: FileFormat) -> None:
    """Check that the output can be written, or replaced if it exists.

    Raises:
        ServiceError: something else exists at this place, or the folder cannot be written to.
    """
    if isinstance(output, str):
        _check_in_bucket(output, format_)
        return
    if format_ == "delta":
        if output.is_file() or (output.is_dir() and any(output.iterdir()) and not (output / "_delta_log").is_dir()):
            raise UsageError(f"{output} exists and is not a Delta table: choose another --output")
    elif output.is_dir():
        raise UsageError(f"{output} is a folder: choose a file as --output, or add --format delta")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output.parent).close()
    except OSError as error:
        raise ConfigurationError(f"cannot write to {output.parent}: {error.strerror}") from error


def _check_in_bucket(output: str, format_: FileFormat) -> None:
    store = open_store(output)
    something = next(iter(store.list()), None)
    if something is not None and (format_ != "delta" or LOG not in store.folders()):
        expected = "a Delta table" if format_ == "delta" else "a file"
        raise ConflictError(
            f"{output}: expected {expected} or nothing, found {something.key} below it; choose another --output"
        )
    folder, _, name = output.rpartition("/")
    probe = f"{name}.{uuid.uuid4().hex}"
    open_store(folder).put(probe, b"")
    open_store(folder).delete([probe])
