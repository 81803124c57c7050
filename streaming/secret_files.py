"""Checks the permissions of files with passwords, keys and tokens."""

import logging
import stat
from functools import cache
from pathlib import Path

from streaming.errors import ConfigurationError

log = logging.getLogger(__name__)


def check_secret_file(path: Path) -> None:
    """Reject a secret that every user of the machine can replace, and warn about one that every user can read.

    Readable files are not rejected, since Kubernetes and Docker mount secrets with mode 0644 or 0444 into containers,
    which have no other users.

    Raises:
        ServiceError: other users may write to the file.
        OSError: it does not exist.
    """
    mode = path.stat().st_mode
    if mode & stat.S_IWOTH:
        raise ConfigurationError(
            f"{path} holds a secret, expected a file that only its owner may write, got mode {stat.S_IMODE(mode):04o}: "
            f"chmod 600 {path}"
        )
    if mode & stat.S_IROTH:
        _warn(path, stat.S_IMODE(mode))


@cache
def _warn(path: Path, mode: int) -> None:
    """Warn once per file."""
    log.warning("%s holds a secret and every user may read it (mode %04o): chmod 600 it", path, mode)
