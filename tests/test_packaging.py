"""The wheel, the requirements of the base and the extras, and the error for a missing extra."""

import os
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Sequence
from email.parser import Parser
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from streaming.extras import COMMANDS, EXTRAS, MissingExtraError, extras_named
from streaming.images.dataset import digit_images, write_images
from streaming.settings import Settings
from tests.conftest import CHECKOUT
from tests.streaming.history import commit_batch

PROJECT = tomllib.loads((CHECKOUT / "pyproject.toml").read_text("utf-8"))["project"]
LOCK = (CHECKOUT / "requirements.lock").read_text("utf-8")
HEAVY = {"pyspark", "delta-spark", "tensorflow", "keras", "onnxruntime", "ai-edge-litert", "streamlit", "fastapi"}
INDIRECT = {"py4j": "pyspark", "multipart": "python-multipart"}  # modules of an extra's indirect requirements
# Runs command lines and prints their exit codes as in a base install: modules of extras cannot be imported.
BASE = f"""
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {[name for one in EXTRAS.values() for name in one]}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
from imagestream import main

home, *lines = sys.argv[1:]
for line in lines:
    sys.argv = ["imagestream", "--home", home, *line.split()]
    try:
        main()
    except SystemExit as ended:
        print(ended.code)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built without a network by the installed build backend."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder]
    subprocess.run(command, cwd=CHECKOUT, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


def requirements(lines: Sequence[str]) -> set[str]:
    return {Requirement(line).name for line in lines}


def test_wheel_contains_typed_packages_and_their_requirements(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = [name for name in names if name.endswith(".dist-info/METADATA")]
        (entry_points,) = [name for name in names if name.endswith("/entry_points.txt")]
        found = Parser().parsestr(archive.read(metadata).decode())
        assert "imagestream = imagestream:main" in archive.read(entry_points).decode()
    tops = {name.partition("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"imagestream", "models", "producer", "streaming"}
    assert {f"{top}/py.typed" for top in tops} <= set(names)
    assert {"streaming/platform/ivy.xml", "streaming/platform/jars.lock"} <= set(names)

    assert found["Description-Content-Type"] == "text/markdown"
    assert found.get_payload()
    needed = [Requirement(line) for line in found.get_all("Requires-Dist") or []]
    base = {one.name for one in needed if one.marker is None}
    assert base == requirements(PROJECT["dependencies"])
    assert not base & HEAVY
    assert not [str(one) for one in needed if any(part.operator in {"==", "==="} for part in one.specifier)]  # no pins
    everything = {one.name for one in needed if not any(name in str(one.marker) for name in ("heif", "mlflow", "otel"))}
    assert everything - base == {one.name for one in needed if one.marker and one.marker.evaluate({"extra": "all"})}
    assert set(found.get_all("Provides-Extra") or []) == {*EXTRAS, "all"}


def test_lock_pins_the_base_and_every_extra() -> None:
    named = [line for lines in PROJECT["optional-dependencies"].values() for line in lines]
    required = requirements([*PROJECT["dependencies"], *named]) - {"imagestream", "pillow-heif"}
    pinned = {line.partition("==")[0] for line in LOCK.splitlines() if "==" in line and not line.startswith(" ")}
    assert required <= pinned


def test_modules_of_an_extra_belong_to_its_requirements() -> None:
    distributions = packages_distributions()
    for extra, modules in EXTRAS.items():
        required = requirements(PROJECT["optional-dependencies"][extra])
        for module in modules:
            if module in distributions:
                owners = {name.lower().replace("_", "-") for name in distributions[module]}
                assert required & (owners | {INDIRECT.get(module, "")}), (
                    f"{module} is not installed by the extra {extra}"
                )
    assert {*COMMANDS} <= {*EXTRAS}


def test_missing_extra_is_one_line_with_its_install_command(trained: Path) -> None:
    extras = {
        "stream": "stream",
        "train --dataset digits": "train",
        "dashboard": "dashboard",
        "gateway": "gateway",
        "predict photo.jpg": "predict",
    }
    command = [sys.executable, "-c", BASE, str(trained), *extras]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["1"] * len(extras), done.stderr
    for line, extra in zip(done.stderr.splitlines(), extras.values(), strict=True):
        assert line.endswith(f"is not installed: pip install 'imagestream[{extra}]'"), line


def test_unrelated_missing_module_is_not_reported_as_an_extra() -> None:
    with pytest.raises(MissingExtraError, match=r"imagestream\[stream\]"), extras_named():
        raise ModuleNotFoundError("No module named 'pyspark.sql'", name="pyspark.sql")
    with pytest.raises(ModuleNotFoundError, match="xyz") as raised, extras_named():
        raise ModuleNotFoundError("No module named 'xyz'", name="xyz")
    assert not isinstance(raised.value, MissingExtraError)


def test_base_install_publishes_and_queries_in_a_new_environment(wheel: Path, broker: Settings, tmp_path: Path) -> None:
    uv, python = Path(sys.executable).with_name("uv"), tmp_path / "venv" / "bin" / "python"
    # The versions of the lock, which are in uv's cache if `make` installed them.
    pins = [line.split(" \\")[0] for line in LOCK.splitlines() if "==" in line and not line.startswith(" ")]
    (tmp_path / "constraints.txt").write_text("\n".join(pins))
    subprocess.run([uv, "venv", "-q", "--python", sys.executable, tmp_path / "venv"], check=True)
    install = [uv, "pip", "install", "-q", "--python", python, "-c", tmp_path / "constraints.txt", wheel]
    subprocess.run(install, check=True)
    listed = subprocess.run([uv, "pip", "list", "--python", python], check=True, capture_output=True, text=True)
    assert not HEAVY & {line.split()[0] for line in listed.stdout.splitlines()}

    settings = Settings(home=tmp_path / "home")
    commit_batch(settings, 0, {0: (0, 4)})
    write_images(tmp_path / "photos", digit_images(3))
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("IMAGESTREAM_", "PYTHON"))}

    def imagestream(*arguments: object) -> str:
        command = [str(word) for word in (python.with_name("imagestream"), "--home", tmp_path / "home", *arguments)]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    servers = ("--bootstrap-servers", broker.bootstrap_servers, "--topic", f"base-{tmp_path.name}")
    assert "sent 3 of 3 files" in imagestream("publish", tmp_path / "photos", *servers)
    assert imagestream("query", "SELECT count(*) AS n FROM predictions", "--format", "csv") == "n\n4\n"
