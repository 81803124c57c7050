"""Downloads Eclipse Temurin, the JDK of the Adoptium project, verifies its SHA-256, and unpacks it.

The checksum comes from the API over TLS, and the archive from the URL that the API returns; an archive that does not
match the checksum is not unpacked.

Source: https://api.adoptium.net/q/swagger-ui, "assets".
"""

import hashlib
import json
import platform
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlencode
from urllib.request import Request, urlopen

from streaming.errors import ConfigurationError, DataError, NotFoundError

try:
    from backports import tarfile  # before Python 3.11.4, the standard library has no extraction filters
except ImportError:
    import tarfile

API = "https://api.adoptium.net"
SYSTEMS = {"Linux": "linux", "Darwin": "mac"}
MACHINES = {"x86_64": "x64", "amd64": "x64", "aarch64": "aarch64", "arm64": "aarch64", "ppc64le": "ppc64le"}
MAX_BYTES = 400 * 1024**2
MAX_UNPACKED_BYTES = 1024**3
MAX_ANSWER_BYTES = 4 * 1024**2
TIMEOUT_S = 60
BLOCK_BYTES = 1024**2
SHA256 = re.compile(r"[0-9a-f]{64}")


def download_jdk(version: str, target: Path, api: str = API) -> None:
    """Unpack the latest JDK of a version into a folder of `target`.

    Raises:
        ServiceError: there is none for this machine, it does not match its checksum, or its archive is unsafe.
        OSError: it cannot be downloaded or unpacked.
    """
    package = _package(version, api)
    with TemporaryDirectory(dir=target) as scratch:
        archive = Path(scratch) / "archive"
        _fetch(package["link"], package["checksum"], archive)
        try:
            _unpack(archive, target)
        except tarfile.TarError as error:
            raise DataError(f"the archive of the JDK is damaged or unsafe: {error}") from error


def _unpack(archive: Path, target: Path) -> None:
    with tarfile.open(archive) as tar:
        size = sum(member.size for member in tar)
        if size > MAX_UNPACKED_BYTES:
            raise DataError(f"the JDK unpacks to {size:,} bytes, the limit is {MAX_UNPACKED_BYTES:,}")
        tar.extractall(target, filter="data")  # nothing outside the folder, no devices, no setuid


def _package(version: str, api: str) -> dict[str, str]:
    query = {
        "architecture": MACHINES.get(platform.machine().lower(), platform.machine().lower()),
        "image_type": "jdk",
        "os": SYSTEMS.get(platform.system(), platform.system().lower()),
        "vendor": "eclipse",
    }
    url = f"{api}/v3/assets/latest/{version}/hotspot?{urlencode(query)}"
    try:
        with _open(url) as answer:
            assets: Any = json.loads(answer.read(MAX_ANSWER_BYTES))
        package = assets[0]["binary"]["package"]
        found = {name: str(package[name]) for name in ("link", "checksum")}
    except (ValueError, LookupError, TypeError) as error:
        raise NotFoundError(f"{api} has no JDK {version} for {query['os']} on {query['architecture']}") from error
    if not SHA256.fullmatch(found["checksum"]):
        raise DataError(f"{api} has no SHA-256 for JDK {version}")
    return found


def _fetch(url: str, checksum: str, file: Path) -> None:
    digest, size = hashlib.sha256(), 0
    with _open(url) as answer, file.open("wb") as out:
        while block := answer.read(BLOCK_BYTES):
            size += len(block)
            if size > MAX_BYTES:
                raise DataError(f"{url} has more than {MAX_BYTES:,} bytes: it is not a JDK")
            digest.update(block)
            out.write(block)
    if digest.hexdigest() != checksum:
        raise DataError(f"{url} has SHA-256 {digest.hexdigest()}, expected {checksum}: it is not unpacked")


def _open(url: str) -> Any:
    if not url.startswith(("https://", "http://127.0.0.1:")):
        raise ConfigurationError(f"expected an address that begins with https://, got {url}")
    return urlopen(Request(url, headers={"User-Agent": "imagestream"}), timeout=TIMEOUT_S)  # noqa: S310  checked above
