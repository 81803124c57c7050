"""The jars of Spark and the embedded broker: listed in `ivy.xml`, fetched once, and pinned by SHA-256 in `jars.lock`.

They are fetched by the Ivy that comes with pyspark, so that neither Maven nor a resolution at every start of Spark is
needed. Ivy's cache is kept next to the jars: a damaged jar is replaced from there, or from the registry if the cache is
damaged as well.
"""

import hashlib
import importlib.util
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from streaming.errors import ConfigurationError, DataError, UnavailableError
from streaming.platform.java import QUICK_JVM
from streaming.storage.home import lock, make_dir

IVY_FILE = Path(__file__).with_name("ivy.xml")
LOCK_FILE = Path(__file__).with_name("jars.lock")
SPARK, BROKER = "spark", "broker"  # the configurations of ivy.xml, each a folder of jars
REPLACED = (
    "spark-token-provider-kafka 4.2.0, which Spark's Kafka connector asks for, is replaced by 4.0.0: "
    "the registry lacks 4.2.0, and both have the same interface"
)
JARS_HINT = "choose another folder with IMAGESTREAM_JARS"
CONNECT_TIMEOUT_MS = 20_000
READ_TIMEOUT_MS = 60_000
SLOW_MBIT_S, BEFORE_FETCHING_S = 20, 15  # a slow connection; Ivy fetches the metadata of all jars first

Progress = Callable[[int, int, str], None]
"""Called with the number of fetched jars, the total, and the name of the last one; at 0, with a message to show."""


@dataclass(frozen=True)
class LockedJar:
    """A jar as `jars.lock` pins it; `name` is `configuration/file`."""

    sha256: str
    bytes: int
    name: str

    def damage(self, jars_dir: Path, *, verify: bool) -> str | None:
        """The problem with the jar in `jars_dir`, None if there is none; with `verify`, its hash is checked as well."""
        path = jars_dir / self.name
        try:
            size = path.stat().st_size
            if size != self.bytes:
                return f"expected {self.bytes:,} bytes, got {size:,}"
            if verify and (sha256 := _sha256(path)) != self.sha256:
                return f"expected SHA-256 {self.sha256}, got {sha256}"
        except OSError as error:
            return error.strerror or str(error)
        return None


@cache
def locked_jars() -> tuple[LockedJar, ...]:
    """Every jar of `jars.lock`."""
    rows = (line.split() for line in LOCK_FILE.read_text().splitlines() if line and not line.startswith("#"))
    return tuple(LockedJar(sha256, int(size), name) for sha256, size, name in rows)


def damaged_jars(jars_dir: Path, *, verify: bool = True) -> dict[str, str]:
    """The missing and damaged jars in `jars_dir`: name → problem."""
    found = {jar.name: jar.damage(jars_dir, verify=verify) for jar in locked_jars()}
    return {name: damage for name, damage in found.items() if damage is not None}


def install_jars(jars_dir: Path, java: Path, on_progress: Progress | None = None, *, verify: bool = False) -> None:
    """Fetch missing and damaged jars; takes milliseconds if there are none.

    A jar is moved into `jars_dir` only if its SHA-256 is the locked one, and by one process at a time.

    Args:
        java: the executable that runs Ivy.
        on_progress: see `Progress`.
        verify: whether to check the hashes of existing jars, not only their sizes.

    Raises:
        ServiceError: a jar cannot be fetched, or does not have the locked hash.
    """
    if not damaged_jars(jars_dir, verify=verify):
        return
    make_dir(jars_dir)
    with lock(jars_dir / ".lock"):
        wanted = damaged_jars(jars_dir, verify=verify)  # another process may have fetched them
        if not wanted:
            return
        if on_progress is not None:
            size = sum(jar.bytes for jar in locked_jars() if jar.name in wanted) / 1e6
            seconds = BEFORE_FETCHING_S + 8 * size / SLOW_MBIT_S
            on_progress(
                0,
                len(wanted),
                f"fetching {len(wanted)} jars ({size:.0f} MB) into {jars_dir}: up to {seconds:.0f} s at "
                f"{SLOW_MBIT_S} Mbit/s",
            )
            on_progress(0, len(wanted), REPLACED)
        wanted = _fetch(jars_dir, java, wanted, on_progress)
        if wanted:  # Ivy does not verify its cache
            for name in wanted:
                for cached in (jars_dir / "ivy").rglob(Path(name).name):
                    cached.unlink()
            wanted = _fetch(jars_dir, java, wanted, on_progress)
        for name, damage in wanted.items():
            raise DataError(f"{name}: {damage}: {_network_hint(jars_dir)}")


def spark_jars(jars_dir: Path) -> list[Path]:
    """The jars for `spark.jars`; raises ServiceError if a jar is missing, or does not have the locked size."""
    return _jars_of(SPARK, jars_dir)


def broker_classpath(jars_dir: Path) -> str:
    """The broker's class path; raises ServiceError if a jar is missing, or does not have the locked size."""
    return os.pathsep.join(str(jar) for jar in _jars_of(BROKER, jars_dir))


def lock_jars(java: Path) -> int:
    """Rewrite `jars.lock` after a change of `ivy.xml`, and return the number of jars.

    Raises:
        ServiceError: a jar cannot be fetched.
    """
    with tempfile.TemporaryDirectory() as scratch:
        fetched = Path(scratch) / "jars"
        _retrieve(fetched, Path(scratch) / "ivy", java, None)
        rows = [
            f"{_sha256(path)}  {path.stat().st_size:>9}  {path.relative_to(fetched)}"
            for path in sorted(fetched.glob("*/*.jar"))
        ]
    header = "# SHA-256, bytes and place of each jar that ivy.xml resolves to; made by `imagestream setup --lock`.\n"
    LOCK_FILE.write_text(header + "\n".join(rows) + "\n")
    locked_jars.cache_clear()
    return len(rows)


def jars_dir_problem(jars_dir: Path) -> str | None:
    """Why class paths and Spark's list of jars cannot contain files of a folder; None if they can."""
    letter = next((letter for letter in (os.pathsep, ",", "%", "#") if letter in str(jars_dir)), None)
    return None if letter is None else f"has a {letter} in its path"


def _jars_of(configuration: str, jars_dir: Path) -> list[Path]:
    jars = [jar for jar in locked_jars() if jar.name.startswith(configuration + "/")]
    if why := jars_dir_problem(jars_dir):
        raise ConfigurationError(f"{jars_dir} {why}: {JARS_HINT}")
    for jar in jars:
        if damage := jar.damage(jars_dir, verify=False):
            raise ConfigurationError(f"{jars_dir / jar.name}: {damage}: run `imagestream setup`")
    return [jars_dir / jar.name for jar in jars]


def _fetch(jars_dir: Path, java: Path, wanted: dict[str, str], on_progress: Progress | None) -> dict[str, str]:
    """Fetch jars and move the valid ones into `jars_dir`; returns the problems of the others."""
    left = {}
    with tempfile.TemporaryDirectory(dir=jars_dir, prefix=".incoming-") as scratch:
        fetched = Path(scratch)
        _retrieve(fetched, jars_dir / "ivy", java, on_progress)
        for jar in locked_jars():
            if jar.name not in wanted:
                continue
            if damage := jar.damage(fetched, verify=True):
                left[jar.name] = damage
                continue
            (jars_dir / jar.name).parent.mkdir(exist_ok=True)
            (fetched / jar.name).replace(jars_dir / jar.name)
    return left


def _retrieve(target: Path, ivy_dir: Path, java: Path, on_progress: Progress | None) -> None:
    """Run Ivy to copy all jars of ivy.xml to `target/configuration/`, with a cache in `ivy_dir`."""
    command = [
        str(java),
        *QUICK_JVM,
        f"-Divy.default.ivy.user.dir={ivy_dir}",
        f"-Dsun.net.client.defaultConnectTimeout={CONNECT_TIMEOUT_MS}",
        f"-Dsun.net.client.defaultReadTimeout={READ_TIMEOUT_MS}",
        *("-jar", str(_ivy_jar())),
        *("-ivy", str(IVY_FILE)),
        *("-retrieve", f"{target}/[conf]/[artifact]-[revision](-[classifier]).[ext]"),
        *("-types", "jar", "bundle"),  # consumes all following arguments, so it comes last
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as ivy:
        output = list(_reported(ivy.stdout or [], on_progress))
    if ivy.returncode:
        raise UnavailableError(f"could not fetch {_failed_artifact(output)}: {_network_hint(target.parent)}")


def _reported(lines: Iterable[str], on_progress: Progress | None) -> Iterator[str]:
    """Yield Ivy's output, and report each downloaded jar."""
    done = 0
    for line in lines:
        fetched = re.search(r"\[SUCCESSFUL ] .*!(\S+)", line)
        if fetched is not None and on_progress is not None:
            done += 1
            on_progress(done, len(locked_jars()), fetched[1])
        yield line


def _failed_artifact(output: list[str]) -> str:
    text = "".join(output)
    failed = re.search(r"\[FAILED\s*] (\S+)", text) or re.search(r":: (\S+#\S+): ", text)
    if failed is not None:
        return failed[1]
    return next((line.strip() for line in output if "Exception" in line), "the jars")


def _network_hint(jars_dir: Path) -> str:
    return (
        "check the network (a proxy: JAVA_TOOL_OPTIONS=-Dhttps.proxyHost=HOST -Dhttps.proxyPort=PORT), "
        f"or copy the jars that {LOCK_FILE} lists to {jars_dir}"
    )


def _ivy_jar() -> Path:
    pyspark = importlib.util.find_spec("pyspark")  # imports nothing
    if pyspark is None or pyspark.origin is None:
        raise ConfigurationError("pyspark is not installed, and Ivy comes with it: run `make setup`")
    return next((Path(pyspark.origin).parent / "jars").glob("ivy-*.jar"))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
