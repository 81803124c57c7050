"""What reaches us of the surroundings in which a command was started: nothing but what is documented.

A command, and every process that it starts (JVM, Python workers, conversion, `retrain --every`), gets

- modules from where they are installed, and from absolute entries of PYTHONPATH, never from the working directory
- an interpreter as Python starts it by default: warnings no errors, `assert` in force, text in UTF-8
- a locale of UTF-8 without a language: paths are what they are, and `i` is the small letter of `I`
- no settings of another Spark or Hadoop

The command line cleans its own environment, once, before it imports anything; where one of our jobs runs in somebody
else's process, the Spark session starts its JVM in a clean copy.
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

FOREIGN = ("HADOOP_", "HIVE_", "PYSPARK_", "SPARK_", "YARN_")  # prefixes of what other installations set
HONOURED = {
    "SPARK_LOCAL_DIRS",  # where Spark keeps its scratch files
    "SPARK_LOCAL_IP",
    "SPARK_LOCAL_HOSTNAME",
    "SPARK_USER",
    "SPARK_SUBMIT_OPTS",  # options of the JVM
    "HADOOP_USER_NAME",
    "SPARK_AUTH_SOCKET_TIMEOUT",  # these two PySpark sets for itself
    "SPARK_BUFFER_SIZE",
}
# A cluster's own configuration, which a master other than `local` is asked for with.
OF_A_CLUSTER = ("HADOOP_", "HIVE_", "YARN_", "SPARK_CONF_DIR")
# These change what our own Python does, and are for programs under development.
INTERPRETER = {f"PYTHON{name}" for name in ("DEVMODE", "INSPECT", "IOENCODING", "OPTIMIZE", "STARTUP", "WARNINGS")}
LOCALE = "C.UTF-8"
LOOPBACK = "127.0.0.1"

_ignored: list[str] = []  # what the command line has dropped from its own environment
_started_with: dict[str, str] = {}


def isolate() -> None:
    """Clean this process, which is a command's own; starts the interpreter again where it could not be cleaned."""
    other_text = not sys.flags.utf8_mode and locale.getencoding().upper().replace("-", "") != "UTF8"
    if sys.flags.optimize or sys.warnoptions or other_text:
        _start_again()
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
    """The environment without what is ignored, and with what keeps our children apart from their surroundings.

    Args:
        local: Spark runs on this machine; a cluster's configuration is none of it.
    """
    dropped = {*ignored(environment, local=local), *INTERPRETER}
    kept = {name: value for name, value in environment.items() if name not in dropped}
    if local:
        kept.setdefault("SPARK_LOCAL_IP", LOOPBACK)  # the machine's own name need not resolve
    return kept | {"PYTHONPATH": _python_path(environment.get("PYTHONPATH", "")), "PYTHONSAFEPATH": "1"} | _utf8()


def child_environment() -> dict[str, str]:
    """The environment of a child process of whatever process we run in."""
    return cleaned(os.environ, local=True)


def ignored(environment: Mapping[str, str], *, local: bool) -> list[str]:
    """The names of the variables of another Spark or Hadoop that have no effect."""
    return sorted(
        name
        for name in environment
        if name.startswith(FOREIGN) and name not in HONOURED and (local or not name.startswith(OF_A_CLUSTER))
    )


def all_ignored(*, local: bool) -> list[str]:
    """They, of this process as it was started."""
    return sorted({*_ignored, *ignored(os.environ, local=local)})


def as_started() -> dict[str, str]:
    """The environment with what was dropped from it, for a process that belongs to the Spark that started us."""
    return _started_with | dict(os.environ)


@contextmanager
def clean_environment(*, local: bool, **variables: str) -> Iterator[None]:
    """For the block, a clean environment with `variables` on top; what the block sets under other names stays."""
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


def given_scratch() -> str | None:
    """The folder for scratch files that the environment names."""
    return os.environ.get("TMPDIR") or None


def give_scratch(folder: str) -> None:
    """Name the folder for scratch files to all children."""
    os.environ["TMPDIR"] = folder


def _start_again() -> NoReturn:
    """Replace this process by one of the same command in an interpreter as Python starts it by default."""
    # What is written to this terminal, or into this pipe, stays in its encoding.
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    environment = {name: value for name, value in os.environ.items() if name not in INTERPRETER}
    environment |= {"PYTHONPATH": _python_path(os.environ.get("PYTHONPATH", "")), "PYTHONIOENCODING": encoding}
    command = [sys.executable, "-P", "-X", "utf8", "-m", "imagestream", *sys.argv[1:]]
    os.execve(sys.executable, command, environment)  # noqa: S606


def _utf8() -> dict[str, str]:
    return {"LC_ALL": LOCALE, "LANG": LOCALE, "PYTHONUTF8": "1"}


def _python_path(given: str) -> str:
    """PYTHONPATH of our children: an empty entry is the working directory, and so is a relative one, mostly."""
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
