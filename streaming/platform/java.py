"""Finds Java 17 or 21 for Spark and the embedded broker, or installs it into the home."""

import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from streaming.errors import ConfigurationError, ServiceError, UnavailableError
from streaming.storage.home import make_dir

VERSIONS = (17, 21)
VERSION_TO_INSTALL = "17"
MODULE = "jdk.incubator.vector"  # required by Spark 4; reduced runtimes lack it
PROBE_TIMEOUT_S = 30
# For JVMs that are short-lived or start often: compile quickly rather than optimise, and collect garbage in one thread.
QUICK_JVM = ("-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC")

INSTALL_COMMANDS = {
    "apt-get": "apt-get install openjdk-17-jre-headless",
    "dnf": "dnf install java-21-openjdk-headless",
    "zypper": "zypper install java-21-openjdk-headless",
    "pacman": "pacman -S jre21-openjdk-headless",
    "apk": "apk add openjdk21-jre-headless",
    "brew": "brew install openjdk@21",
}


@dataclass(frozen=True)
class Java:
    """A Java installation."""

    executable: Path
    version: int
    has_vector_module: bool

    @property
    def is_usable(self) -> bool:
        return self.version in VERSIONS and self.has_vector_module

    def __str__(self) -> str:
        lack = "" if self.has_vector_module else f" without {MODULE}"
        return f"Java {self.version}{lack} at {self.executable}"


def find_java(home: Path) -> Path:
    """The executable of the first usable Java in `JAVA_HOME`, `PATH` and the home's `java/`; it is in `JAVA_HOME/bin`.

    Raises:
        ServiceError: there is none; the error lists what was found, and the platform's command to install one.
    """
    found = []
    for candidate in _candidates(home):
        java = _probe(candidate)
        if java is not None and java.is_usable:
            return java.executable
        found.append(str(java or f"one that does not run at {candidate}"))
    instead = "found " + ", ".join(found) if found else f"there is none in JAVA_HOME, PATH or {home / 'java'}"
    raise ConfigurationError(f"Java 17 or 21 is needed, {instead}", hint=install_hint())


def install_hint() -> str:
    """How to install Java on this machine."""
    by_platform = "brew" if platform.system() == "Darwin" else "apt-get"
    manager = next((name for name in INSTALL_COMMANDS if shutil.which(name)), by_platform)
    return f"run `{INSTALL_COMMANDS[manager]}`, or set JAVA_HOME to one"


def install_java(home: Path) -> Path:
    """Download a JDK of about 190 MB into the home's `java/`, verify its SHA-256, and return the executable.

    Raises:
        ServiceError: the download failed; the error has the platform's command to install Java.
    """
    from streaming.platform.jdk_download import download_jdk

    target = make_dir(home / "java")
    try:
        download_jdk(VERSION_TO_INSTALL, target)
    except (ServiceError, OSError) as error:
        raise UnavailableError(
            f"Java 17 or 21 is needed, and could not be downloaded ({error})", hint=install_hint()
        ) from error
    return find_java(home)


def _candidates(home: Path) -> list[Path]:
    candidates = []
    if java_home := os.environ.get("JAVA_HOME"):  # the convention of all Java tools
        candidates.append(Path(java_home) / "bin" / "java")
    if on_path := shutil.which("java"):
        candidates.append(Path(on_path))
    candidates += sorted((home / "java").glob("*/bin/java"))
    candidates += sorted((home / "java").glob("*/Contents/Home/bin/java"))  # a JDK of macOS
    return candidates


def _probe(executable: Path) -> Java | None:
    """The Java behind `executable`, which may be a link or a shim; None if it does not run."""
    command = [str(executable), "-XshowSettings:properties", "-version"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_TIMEOUT_S, check=True).stderr
    except (OSError, subprocess.SubprocessError):
        return None
    home = re.search(r"^\s*java\.home = (.+)$", answer, re.MULTILINE)
    version = re.search(r"^\s*java\.specification\.version = (?:1\.)?(\d+)$", answer, re.MULTILINE)
    if home is None or version is None:
        return None
    java_home = Path(home[1].strip())
    return Java(java_home / "bin" / "java", int(version[1]), _has_module(java_home))


def _has_module(java_home: Path) -> bool:
    try:
        modules = re.search(r'^MODULES="(.*)"$', (java_home / "release").read_text(), re.MULTILINE)
    except OSError:
        return True  # some vendors' complete distributions lack the file
    return modules is None or MODULE in modules[1].split()
