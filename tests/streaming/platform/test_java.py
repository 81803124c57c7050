"""The search for Java: JAVA_HOME, the path and the home, and refusal of unsuitable versions."""

import stat
from pathlib import Path

import pytest

from streaming.errors import ServiceError
from streaming.platform.java import find_java, install_hint

SHIM = """#!/bin/sh
echo "    java.home = {home}" >&2
echo "    java.specification.version = {version}" >&2
"""


def fake_java(place: Path, version: str, modules: str = "java.base jdk.incubator.vector") -> Path:
    """A `java` that reports this version and these modules, because no machine has every version."""
    executable = place / "bin" / "java"
    executable.parent.mkdir(parents=True)
    executable.write_text(SHIM.format(home=place, version=version))
    executable.chmod(executable.stat().st_mode | stat.S_IEXEC)
    (place / "release").write_text(f'JAVA_VERSION="{version}"\nMODULES="{modules}"\n')
    return executable


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A home on a machine without Java."""
    (tmp_path / "empty").mkdir()
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    return tmp_path / "home"


def test_java_of_this_machine_is_two_levels_below_its_home(tmp_path: Path) -> None:
    java = find_java(tmp_path)
    assert java.is_file()
    assert (java.parent.parent / "lib").is_dir()


def test_missing_java_error_names_both_versions_and_a_command(nowhere: Path) -> None:
    with pytest.raises(ServiceError, match=r"Java 17 or 21 is needed, there is none .*: run `.*(17|21).*`") as error:
        find_java(nowhere)
    assert "\n" not in str(error.value)


def test_java_of_the_home_is_found_last(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = fake_java(nowhere / "java" / "jdk-21", "21")
    assert find_java(nowhere) == inside
    elsewhere = fake_java(nowhere.parent / "elsewhere", "17")
    monkeypatch.setenv("JAVA_HOME", str(nowhere.parent / "elsewhere"))
    assert find_java(nowhere) == elsewhere


def test_java_of_another_version_is_skipped_and_named(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = fake_java(nowhere.parent / "old", "1.8")
    monkeypatch.setenv("JAVA_HOME", str(nowhere.parent / "old"))
    with pytest.raises(ServiceError, match=f"found Java 8 at {old}"):
        find_java(nowhere)
    new = fake_java(nowhere / "java" / "jdk-17", "17")
    assert find_java(nowhere) == new


def test_java_without_the_vector_module_is_refused(nowhere: Path) -> None:
    fake_java(nowhere / "java" / "trimmed", "17", modules="java.base")
    with pytest.raises(ServiceError, match=r"without jdk\.incubator\.vector"):
        find_java(nowhere)


def test_java_that_does_not_run_is_named(nowhere: Path) -> None:
    broken = fake_java(nowhere / "java" / "broken", "17")
    broken.write_text("not a program")
    with pytest.raises(ServiceError, match=f"one that does not run at {broken}"):
        find_java(nowhere)


@pytest.mark.parametrize("manager", ["apt-get", "dnf", "brew"])
def test_install_hint_uses_the_available_package_manager(nowhere: Path, manager: str) -> None:
    tool = nowhere.parent / "empty" / manager
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    assert install_hint().startswith(f"run `{manager} install ")
