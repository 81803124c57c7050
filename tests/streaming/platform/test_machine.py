"""Machines like containers: memory limits, users without a passwd entry, unusable scratch folders, full disks."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from streaming.environment import ROOT
from streaming.errors import ServiceError
from streaming.platform.machine import memory
from streaming.platform.scratch import use_scratch
from streaming.settings import read_settings
from tests.streaming.platform.test_session import START

MIB = 1024**2
UNSHARE = shutil.which("unshare") or ""
ALLOWED = bool(UNSHARE) and subprocess.run([UNSHARE, "-Urm", "--uts", "true"], check=False).returncode == 0
needs_namespaces = pytest.mark.skipif(not ALLOWED, reason="this machine allows no user namespaces")

# Like `docker run --read-only` with a volume, a host name that does not resolve, and /tmp mounted noexec. A checkout
# below /tmp stays visible.
CONTAINER = """
set -e
hostname no-such-host
mount --bind "$1" /mnt
mount --rbind "$2" /media
mount -t tmpfs -o noexec tmpfs /tmp
test -d "$2" || { mkdir -p "$2"; mount --rbind /media "$2"; }
mount -o remount,bind,ro /
shift 2
exec "$@"
"""


def in_namespace(*words: str | Path, options: tuple[str, ...] = ("-Urm", "--uts")) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [UNSHARE, *options, *map(str, words)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


@pytest.mark.parametrize("version", [1, 2])
def test_memory_is_limited_by_the_control_groups_of_the_process(tmp_path: Path, version: int) -> None:
    group = tmp_path / ("memory" if version == 1 else "") / "pod" / "container"
    group.mkdir(parents=True)
    limit, used, cached = (
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        if version == 1
        else ("memory.max", "memory.current", "inactive_file")
    )
    own = tmp_path / "own"
    own.write_text("4:cpu,memory:/pod/container\n0::/\n" if version == 1 else "0::/pod/container\n")
    assert memory(tmp_path, own).total == psutil.virtual_memory().total

    (group.parent / limit).write_text(f"{512 * MIB}\n")
    (group.parent / used).write_text(f"{400 * MIB}\n")
    (group.parent / "memory.stat").write_text(f"cache 1\n{cached} {100 * MIB}\n")
    (group / limit).write_text("max\n" if version == 2 else f"{2**63 - 4096}\n")
    assert (memory(tmp_path, own).total, memory(tmp_path, own).available) == (512 * MIB, 212 * MIB)
    # In a container, its group is the root of the hierarchy, whatever its path on the host is.
    own.write_text(own.read_text().replace("pod", "of-the-host"))
    top = group.parents[1]
    for name in (limit, used):
        (top / name).write_text(f"{300 * MIB}\n")
    assert (memory(tmp_path, own).total, memory(tmp_path, own).available) == (300 * MIB, 0)


def test_limit_of_a_real_control_group_is_detected() -> None:
    groups = Path("/sys/fs/cgroup")
    version_1 = (groups / "memory").is_dir()
    group = (groups / "memory" if version_1 else groups) / f"imagestream-{os.getpid()}"
    try:
        group.mkdir()
        (group / ("memory.limit_in_bytes" if version_1 else "memory.max")).write_text(str(2**31))
    except OSError as error:
        if group.is_dir():
            group.rmdir()
        pytest.skip(f"this machine's control groups cannot be written: {error}")
    enter = f'echo $$ > {group}/cgroup.procs; exec "$0" "$@"'
    show = "from streaming.platform.machine import memory; print(memory().total)"
    try:
        done = subprocess.run(
            ["/bin/sh", "-c", enter, sys.executable, "-c", show],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout == f"{2**31}\n"
    finally:
        group.rmdir()


@needs_namespaces
def test_spark_starts_in_a_read_only_container_with_noexec_tmp(tmp_path: Path) -> None:
    jars = read_settings().jars_dir.resolve()
    inside = [sys.executable, "-c", START, "/mnt/home", jars, "local[1]", "1g", "SELECT 1"]
    done = in_namespace("/bin/sh", "-c", CONTAINER, "sh", tmp_path, ROOT, *inside)
    assert done.stdout.startswith("10 700 "), done.stdout + done.stderr


@needs_namespaces
def test_user_without_a_passwd_entry_is_refused_with_the_fix(tmp_path: Path) -> None:
    show = (
        "from pathlib import Path; from streaming.errors import ServiceError\n"
        "from streaming.platform.doctor import check_user; from streaming.platform.machine import user_name\n"
        "from streaming.platform.session import spark_session; from streaming.settings import Settings\n"
        f"settings = Settings(home=Path({str(tmp_path)!r}))\n"
        "print(check_user(settings).fix); print(user_name())\n"
        "try:\n    with spark_session(settings, 'x'): pass\nexcept ServiceError as error: print(error)\n"
    )
    mapped = ("-U", "--map-user=54321", "--map-group=0")
    done = in_namespace("env", "-u", "USER", "-u", "LOGNAME", sys.executable, "-c", show, options=mapped)
    fix, name, refused = done.stdout.splitlines()
    assert "'imagestream:x:54321:0::/tmp:/sbin/nologin' to /etc/passwd" in fix
    assert name == "uid 54321"
    assert refused.startswith("user 54321 has no entry in /etc/passwd, without which Hadoop's login fails: ")


def test_scratch_files_are_in_the_home_if_tmp_is_unusable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "none"))
    assert use_scratch(tmp_path / "home") == tmp_path / "home" / "tmp"
    assert os.environ["TMPDIR"] == str(tmp_path / "home" / "tmp")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "none"))
    (tmp_path / "file").touch()
    with pytest.raises(ServiceError, match="cannot be created .*: set TMPDIR to a folder that can be written"):
        use_scratch(tmp_path / "file")


FILL = """
import sys
from pathlib import Path
from streaming.jobs.audit import audit
from streaming.settings import Settings
from tests.streaming.history import commit_batch

home = Path(sys.argv[1])
settings = Settings(home=home / "home")
commit_batch(settings, 0, {0: (0, 8)})
with (home / "filler").open("wb", buffering=0) as filler:
    try:
        while filler.write(bytes(4096)):
            pass
    except OSError:
        pass
try:
    commit_batch(settings, 1, {0: (8, 16)})
except Exception as error:
    print("No space left on device" in str(error))
(home / "filler").unlink()
commit_batch(settings, 1, {0: (8, 16)})
commit_batch(settings, 2, {0: (16, 24)})
report = audit(settings)
print(report.clean)
"""


@needs_namespaces
def test_full_disk_during_a_batch_loses_and_duplicates_nothing(tmp_path: Path) -> None:
    disk = 'mount -t tmpfs -o size=1m tmpfs "$1"; shift; exec "$@"'
    done = in_namespace("/bin/sh", "-c", disk, "sh", tmp_path, sys.executable, "-c", FILL, tmp_path)
    assert done.stdout.split() == ["True", "True"], done.stdout + done.stderr
