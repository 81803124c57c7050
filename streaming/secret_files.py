"""Files that hold passwords, keys and tokens: who else may read or change them."""

import logging
import stat
from functools import cache
from pathlib import Path

from streaming.errors import ConfigurationError

log = logging.getLogger(__name__)


def check_secret_file(path: Path) -> None:
    """Refuse a secret that every user of the machine may replace, and warn of one that every user may read.

    Readable ones are not refused: Kubernetes and Docker mount secrets with mode 0644 or 0444, into containers where
    there is nobody else.

    Raises:
        ServiceError: others may write to it.
        OSError: it is not there.
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
    """Once for each file."""
    log.warning("%s holds a secret and every user may read it (mode %04o): chmod 600 it", path, mode)
