"""A JDK is unpacked only if its checksum matches; the download API is a server on loopback."""

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from streaming.errors import ServiceError
from streaming.platform.jdk_download import download_jdk
from tests.http_server import QuietHandler, http_server


def archive(name: str = "jdk-17/bin/java", kind: bytes = tarfile.REGTYPE) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        member = tarfile.TarInfo(name)
        member.type, member.mode = kind, 0o4755
        member.linkname = "/etc/passwd"
        member.size = 4 if kind == tarfile.REGTYPE else 0
        tar.addfile(member, io.BytesIO(b"java"))
    return packed.getvalue()


@contextmanager
def api(content: bytes, checksum: str | None = None) -> Iterator[str]:
    class Handler(QuietHandler):
        def do_GET(self) -> None:  # noqa: N802  the name expected by http.server
            link = f"http://127.0.0.1:{self.server.server_address[1]}/archive"
            package = {"link": link, "checksum": checksum or hashlib.sha256(content).hexdigest()}
            body = content if self.path == "/archive" else json.dumps([{"binary": {"package": package}}]).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

    with http_server(Handler) as url:
        yield url


def test_jdk_with_a_matching_checksum_is_unpacked(tmp_path: Path) -> None:
    with api(archive()) as url:
        download_jdk("17", tmp_path, url)
    java = tmp_path / "jdk-17" / "bin" / "java"
    assert java.read_bytes() == b"java"
    assert java.stat().st_mode & 0o7777 == 0o755, "executable, and without setuid"
    assert [path.name for path in tmp_path.iterdir()] == ["jdk-17"]


def test_altered_jdk_is_not_unpacked(tmp_path: Path) -> None:
    with api(archive(), "0" * 64) as url, pytest.raises(ServiceError, match="has SHA-256 .*, expected 0000"):
        download_jdk("17", tmp_path, url)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "kind"), [("../outside", tarfile.REGTYPE), ("jdk-17/link", tarfile.SYMTYPE)])
def test_archive_member_outside_its_folder_is_refused(tmp_path: Path, name: str, kind: bytes) -> None:
    (tmp_path / "java").mkdir()
    with (
        api(archive(name, kind)) as url,
        pytest.raises(ServiceError, match="damaged or unsafe: .*(outside|absolute path)"),
    ):
        download_jdk("17", tmp_path / "java", url)
    assert not (tmp_path / "outside").exists()


@pytest.mark.parametrize("checksum", ["", "abc", "z" * 64])
def test_jdk_without_a_checksum_is_not_downloaded(tmp_path: Path, checksum: str) -> None:
    with api(archive(), checksum or "-") as url, pytest.raises(ServiceError, match="has no SHA-256 for JDK 17"):
        download_jdk("17", tmp_path, url)
