"""Isolates commands from the environment in which they are started, except for documented variables.

A command, and every process that it starts (JVM, Python workers, conversion, `retrain --every`), has

- modules from their installation and from absolute entries of PYTHONPATH, never from the working directory
- a Python interpreter with default options: warnings are not errors, `assert` is active, text is UTF-8
- a UTF-8 locale without a language, so that upper and lower case do not depend on the user's language
- no settings of another Spark or Hadoop

The command line cleans its own environment once, before it imports other modules. If a job runs in a user's own
process, the Spark session starts the JVM with a clean copy of the environment.
"""

import locale
import os
import site
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.machinery import PathFinder
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[1]  # of our packages
PACKAGES = ("models", "producer", "streaming")

FOREIGN = ("HADOOP_", "HIVE_", "PYSPARK_", "SPARK_", "YARN_")  # prefixes of variables of other installations
HONOURED = {
    "SPARK_LOCAL_DIRS",  # where Spark keeps its scratch files
    "SPARK_LOCAL_IP",
    "SPARK_LOCAL_HOSTNAME",
    "SPARK_USER",
    "SPARK_SUBMIT_OPTS",  # options of the JVM
    "HADOOP_USER_NAME",
    "SPARK_AUTH_SOCKET_TIMEOUT",  # these two are set by PySpark itself
    "SPARK_BUFFER_SIZE",
}
# The configuration of a cluster, which a master other than `local` needs.
CLUSTER_PREFIXES = ("HADOOP_", "HIVE_", "YARN_", "SPARK_CONF_DIR")
# Variables that change the behaviour of the Python interpreter, intended for development.
INTERPRETER = {f"PYTHON{name}" for name in ("DEVMODE", "INSPECT", "IOENCODING", "OPTIMIZE", "STARTUP", "WARNINGS")}
UTF8 = {"LC_ALL": "C.UTF-8", "LANG": "C.UTF-8", "PYTHONUTF8": "1"}
LOOPBACK = "127.0.0.1"

_ignored: list[str] = []  # what the command line has dropped from its own environment
_started_with: dict[str, str] = {}


def isolate() -> None:
    """Clean the environment of this process, which must be a command's own; restarts the interpreter if necessary."""
    other_text = not sys.flags.utf8_mode and locale.getencoding().upper().replace("-", "") != "UTF8"
    if sys.flags.optimize or sys.warnoptions or other_text:
        _restart_interpreter()
    _started_with.update(os.environ)
    _ignored[:] = ignored(os.environ, local=False)
    clean = cleaned(os.environ, local=False)
    os.environ.clear()
    os.environ.update(clean)
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    explicit = {ROOT, *map(Path, _absolute(os.environ["PYTHONPATH"]))}
    here = _working_directory()
    sys.path[:] = [entry for entry in sys.path if Path(entry) in explicit or (entry and Path(entry) != here)]
    if not all(map(_is_ours, PACKAGES)):
        sys.path.insert(0, str(ROOT))


def cleaned(environment: Mapping[str, str], *, local: bool) -> dict[str, str]:
    """The environment without ignored variables, and with those that isolate child processes.

    Args:
        local: whether Spark runs on this machine, so that a cluster's configuration is ignored.
    """
    dropped = {*ignored(environment, local=local), *INTERPRETER}
    kept = {name: value for name, value in environment.items() if name not in dropped}
    if local:
        kept.setdefault("SPARK_LOCAL_IP", LOOPBACK)  # the machine's host name may not resolve
    return kept | {"PYTHONPATH": _python_path(environment.get("PYTHONPATH", "")), "PYTHONSAFEPATH": "1"} | UTF8


def child_environment() -> dict[str, str]:
    """The environment of a child process."""
    return cleaned(os.environ, local=True)


def ignored(environment: Mapping[str, str], *, local: bool) -> list[str]:
    """The names of the variables of another Spark or Hadoop that have no effect."""
    return sorted(
        name
        for name in environment
        if name.startswith(FOREIGN) and name not in HONOURED and (local or not name.startswith(CLUSTER_PREFIXES))
    )


def all_ignored(*, local: bool) -> list[str]:
    """The ignored variables of the environment in which this process was started."""
    return sorted({*_ignored, *ignored(os.environ, local=local)})


def as_started() -> dict[str, str]:
    """The original environment, for a process that belongs to the Spark that started this one."""
    return _started_with | dict(os.environ)


@contextmanager
def clean_environment(*, local: bool, **variables: str) -> Iterator[None]:
    """Clean the environment and set `variables` within the block; other variables that the block sets are kept."""
    before = dict(os.environ)
    inside = cleaned(before, local=local) | variables
    for name in before.keys() - inside.keys():
        del os.environ[name]
    os.environ.update(inside)
    try:
        yield
    finally:
        for name in inside.keys() - before.keys():
            os.environ.pop(name, None)
        os.environ.update(before)


def scratch_folder() -> str | None:
    """The folder for temporary files in the environment, if set."""
    return os.environ.get("TMPDIR") or None


def set_scratch(folder: str) -> None:
    """Set the folder for temporary files of child processes."""
    os.environ["TMPDIR"] = folder


def _restart_interpreter() -> NoReturn:
    """Replace this process by the same command in an interpreter with default options."""
    # Output to this terminal or pipe keeps its encoding.
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    environment = {name: value for name, value in os.environ.items() if name not in INTERPRETER}
    environment |= {"PYTHONPATH": _python_path(os.environ.get("PYTHONPATH", "")), "PYTHONIOENCODING": encoding}
    command = [sys.executable, "-P", "-X", "utf8", "-m", "imagestream", *sys.argv[1:]]
    os.execve(sys.executable, command, environment)  # noqa: S606


def _python_path(given: str) -> str:
    """PYTHONPATH of child processes, without empty and relative entries, which refer to the working directory."""
    entries = _absolute(given)
    if str(ROOT) not in site.getsitepackages() or sys.path[:1] == [str(ROOT)]:
        entries = [str(ROOT), *(entry for entry in entries if entry != str(ROOT))]
    return os.pathsep.join(entries)


def _absolute(path: str) -> list[str]:
    return [entry for entry in path.split(os.pathsep) if Path(entry).is_absolute()]


def _is_ours(name: str) -> bool:
    found = PathFinder.find_spec(name)  # imports nothing
    return found is not None and found.origin is not None and Path(found.origin).resolve().parents[1] == ROOT


def _working_directory() -> Path | None:
    try:
        return Path.cwd()
    except OSError:  # it has been removed
        return None
