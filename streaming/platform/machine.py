"""The memory and the user name that the machine, or the container, provides."""

import getpass
import os
import pwd
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from streaming.errors import ConfigurationError

CONTROL_GROUPS = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")
NAMELESS_USER = (
    "user {uid} has no entry in /etc/passwd, without which Hadoop's login fails: run the container as a user that has "
    "one (docker run --user 10001), or add the line 'imagestream:x:{uid}:0::/tmp:/sbin/nologin' to /etc/passwd"
)


@dataclass(frozen=True)
class Memory:
    """Total and available memory in bytes."""

    total: int
    available: int


def memory(control_groups: Path = CONTROL_GROUPS, own_groups: Path = OWN_GROUPS) -> Memory:
    """The machine's memory, limited by the process's control groups (version 1 or 2)."""
    machine = psutil.virtual_memory()
    total, available = int(machine.total), int(machine.available)
    for limit, used in _limits(control_groups, own_groups):
        total, available = min(total, limit), min(available, max(0, limit - used))
    return Memory(total, available)


def _limits(control_groups: Path, own_groups: Path) -> Iterator[tuple[int, int]]:
    """(limit, used) of each control group of the process, including outer ones, since every limit applies."""
    for line in _text(own_groups).splitlines():
        _, controllers, path = line.split(":", 2)
        # A container usually sees its own group as the root, regardless of its path on the host.
        names = [name for name in path.split("/") if name]
        if controllers == "":
            files, top = ("memory.max", "memory.current", "inactive_file"), control_groups
        elif "memory" in controllers.split(","):
            files = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            top = control_groups / "memory"
        else:
            continue
        for depth in range(len(names) + 1):
            group = top.joinpath(*names[:depth])
            limit, used = (_text(group / file).strip() for file in files[:2])
            if limit.isdecimal():  # not "max"
                yield int(limit), int(used or 0) - _page_cache_bytes(group, files[2])


def _page_cache_bytes(group: Path, name: str) -> int:
    """The size of the page cache, which the kernel frees when memory is needed."""
    lines = (line.split() for line in _text(group / "memory.stat").splitlines())
    return next((int(value) for key, value in lines if key == name), 0)


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""


def has_passwd_entry() -> bool:
    """Whether the user has an entry in /etc/passwd, which Hadoop's login requires."""
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        return False
    return True


def check_user() -> None:
    """Raise a ServiceError if the user has no name, without which Spark's JVM fails."""
    if not has_passwd_entry():
        raise ConfigurationError(NAMELESS_USER.format(uid=os.getuid()))


def user_name() -> str:
    """The user's name, or the user id if there is none."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"
