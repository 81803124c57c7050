"""Bundles as one zip file with uncompressed entries.

Zip files are untrusted. Only the form that `write_zip` writes is accepted: few entries with plain names, uncompressed,
so that none is larger than the file; `models.bundle.read_bundle` checks the hashes of their content.
"""

import os
import struct
import zipfile
from collections.abc import Collection
from pathlib import Path

from models.bundle import CLASSIFIER, MANIFEST, BundleFiles
from models.errors import ModelError

MAX_ENTRIES = 32
MAX_DIRECTORY_BYTES = 16 * 1024
END = struct.Struct("<4s4H2LH")  # the end of the central directory (PKWARE's APPNOTE, 4.3.16)
END_SIGNATURE = b"PK\5\6"
EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time of a zip; a constant one makes the file reproducible
BAD = (zipfile.BadZipFile, zipfile.LargeZipFile, EOFError, NotImplementedError, RuntimeError, ValueError, struct.error)


def write_zip(folder: Path, file: Path) -> None:
    """Write the bundle in `folder` into one file, atomically.

    Raises:
        ModelError: the bundle is larger than 4 GiB, the limit of a zip.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with zipfile.ZipFile(unfinished, "w", zipfile.ZIP_STORED, allowZip64=False) as target:
            for path in sorted(folder.iterdir()):
                with target.open(zipfile.ZipInfo(path.name, EPOCH), "w") as entry:
                    entry.write(path.read_bytes())
        unfinished.replace(file)
    except BAD as error:
        raise ModelError(f"the bundle does not fit into {file}: {error}") from error
    finally:
        unfinished.unlink(missing_ok=True)


def is_bundle_zip(file: Path) -> bool:
    """Whether a file is a zip of a bundle; other model formats can be zip files, too."""
    try:
        return {MANIFEST, CLASSIFIER} <= set(ZipFiles(file).names())
    except (ModelError, OSError):
        return False


class ZipFiles(BundleFiles):
    """The files of a bundle in a zip.

    Raises:
        ModelError: the file is not a zip of a bundle; the message says why.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._entries = self._read_entries()

    def __str__(self) -> str:
        return str(self._file)

    def names(self) -> Collection[str]:
        return self._entries.keys()

    def size(self, name: str) -> int:
        if name not in self._entries:
            raise ModelError(f"{name} is missing")
        return self._entries[name].file_size

    def read(self, name: str) -> bytes:
        try:
            with zipfile.ZipFile(self._file) as source, source.open(self._entries[name]) as entry:
                return entry.read(self.size(name))
        except KeyError as error:
            raise ModelError(f"{name} is missing") from error
        except BAD as error:
            raise ModelError(f"{name} cannot be read: {error}") from error

    def _read_entries(self) -> dict[str, zipfile.ZipInfo]:
        self._check_directory()  # before it is parsed: it could be as large as the file
        try:
            with zipfile.ZipFile(self._file) as source:
                entries = source.infolist()
        except BAD as error:
            raise ModelError(f"{self} is not a zip of a bundle: {error}") from error
        found: dict[str, zipfile.ZipInfo] = {}
        for entry in entries:
            if not entry.filename.replace(".", "").replace("_", "").isalnum() or not entry.filename.isascii():
                raise ModelError(f"{self} contains {entry.filename[:100]!r}: expected plain file names")
            if entry.filename in found or entry.flag_bits & 1 or entry.compress_type != zipfile.ZIP_STORED:
                raise ModelError(f"{self}: {entry.filename} is duplicated, encrypted or compressed")
            if entry.file_size != entry.compress_size or entry.file_size > self._file.stat().st_size:
                raise ModelError(f"{self}: {entry.filename} claims to be larger than it is")
            found[entry.filename] = entry
        return found

    def _check_directory(self) -> None:
        with self._file.open("rb") as stream:
            stream.seek(0, os.SEEK_END)
            stream.seek(-min(END.size, stream.tell()), os.SEEK_END)
            end = stream.read(END.size)
        if len(end) < END.size or not end.startswith(END_SIGNATURE):
            raise ModelError(f"{self} is not a zip of a bundle")
        _, _, _, _, entries, n_bytes, _, comment = END.unpack(end)
        if entries > MAX_ENTRIES or n_bytes > MAX_DIRECTORY_BYTES or comment:
            raise ModelError(f"{self} is not a zip of a bundle: it has {entries:,} entries")
