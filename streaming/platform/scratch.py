"""Chooses the folder for temporary files: the system's, or one in the work folder if the system's cannot be used.

Java unpacks native libraries of Parquet and Kafka there, which it cannot load from a file system that is mounted
noexec; in a container with a read-only root file system, the system's folder is not writable.
"""

import os
import tempfile
from pathlib import Path

from streaming.environment import scratch_folder, set_scratch
from streaming.errors import ConfigurationError

OF_JAVA = "/tmp"  # noqa: S108  regardless of TMPDIR


def use_scratch(work: Path) -> Path:
    """Choose the folder for this process and its children, and return it.

    Raises:
        ServiceError: neither the system's folder nor one in the work folder can be used.
    """
    system = Path(scratch_folder() or OF_JAVA)
    if unusable_reason(system) is None:
        return system
    own = work / "tmp"
    try:
        own.mkdir(parents=True, exist_ok=True)
        why = unusable_reason(own)
    except OSError as error:
        why = f"cannot be created ({error.strerror})"
    if why is not None:
        raise ConfigurationError(
            f"{system} {unusable_reason(system)} and {own} {why}",
            hint="set TMPDIR to a folder that can be written, on a file system that is not mounted noexec",
        )
    tempfile.tempdir = str(own)
    set_scratch(str(own))
    return own


def unusable_reason(folder: Path) -> str | None:
    """Why a folder cannot be used for temporary files; None if it can."""
    try:
        flags = os.statvfs(folder).f_flag
    except OSError as error:
        return f"cannot be used ({error.strerror})"
    if flags & os.ST_RDONLY or not os.access(folder, os.W_OK | os.X_OK):
        return "cannot be written"
    return "is mounted noexec, so that Java cannot load libraries from it" if flags & os.ST_NOEXEC else None


def java_scratch() -> list[str]:
    """The JVM option for the folder, if it is not the JVM's default."""
    folder = scratch_folder()
    return [f"-Djava.io.tmpdir={folder}"] if folder and folder != OF_JAVA else []
