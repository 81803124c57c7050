"""`import imagestream`: its public names, what it imports, and the snippets of docs/python.md."""

import os
import re
import shutil
import subprocess
import sys
from contextlib import chdir, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

import imagestream
from streaming.images.dataset import digit_images, write_images
from streaming.settings import Settings
from tests.conftest import CHECKOUT, environment, environment_of
from tests.models import onnx_graphs as graphs
from tests.streaming.history import commit_batch

PAGE = (CHECKOUT / "docs" / "python.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def folder(trained: Path, exports: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with photographs, and a home with a model and two batches."""
    folder = tmp_path_factory.mktemp("python")
    shutil.copytree(trained, folder / ".imagestream", symlinks=True)
    for batch in range(2):
        commit_batch(
            Settings(home=folder / ".imagestream"), batch, {0: (4 * batch, 4 * batch + 4)}, bad={4 * batch + 3}
        )
    write_images(folder / "photos", digit_images(5, 300))
    return folder


def test_public_names_exist_and_are_documented() -> None:
    for name in imagestream.__all__:
        found = getattr(imagestream, name)
        assert isinstance(found, str) or found.__doc__, name
    assert dir(imagestream) == sorted(imagestream.__all__)
    with pytest.raises(AttributeError, match="absent"):
        imagestream.absent  # noqa: B018
    named = set(re.findall(r"imagestream\.(\w+)\(|`(\w+Error)`", PAGE))
    assert {one or other for one, other in named} <= set(imagestream.__all__) | {"ImportError"}


def test_import_loads_only_the_standard_library_and_query_no_engine(folder: Path) -> None:
    source = (
        "import sys\nbefore = set(sys.modules)\nimport imagestream\nprint(*(set(sys.modules) - before))\n"
        "imagestream.query('SELECT 1 AS one', home=sys.argv[1])\nprint(*sys.modules)"
    )
    command = [sys.executable, "-c", source, folder / ".imagestream"]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=True)
    imported, queried = ({name.partition(".")[0] for name in line.split()} for line in done.stdout.splitlines())
    assert "imagestream" in imported
    assert not imported - {"imagestream"} - set(sys.stdlib_module_names)
    assert "duckdb" in queried
    assert not queried & {"pyspark", "py4j", "tensorflow", "keras", "pandas", "PIL", "onnxruntime", "ai_edge_litert"}


def test_package_that_shadows_one_of_imagestream_is_named(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").write_text("raise SystemExit('imported')\n")
    command = [sys.executable, "-c", "import imagestream\nimagestream.load"]
    variables = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(CHECKOUT)])}
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"ImportError: {tmp_path / 'models' / '__init__.py'} shadows")
    assert "rename it" in last


def test_model_is_imported_exported_cleared_and_deleted(tmp_path: Path) -> None:
    onnx = graphs.save(graphs.classifier(), tmp_path / "net.onnx")
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    first = imagestream.import_model(f"{onnx}:scores", preset="raw", home=home)
    assert (first.version, first.aliases, first.training_rows) == (1, ("champion",), 0)
    second = imagestream.import_model(onnx, alias="challenger", changes={"mean": (0.5,)}, home=home)
    assert (second.version, second.aliases) == (2, ("challenger",))

    file = imagestream.export_version(2, tmp_path / "model.zip", home=home)
    assert imagestream.import_model(file, home=elsewhere).aliases == ("champion",)
    again = imagestream.import_model(file, alias="challenger", home=elsewhere)
    assert (again.version, again.aliases) == (1, ("champion", "challenger"))
    with pytest.raises(
        imagestream.ServiceError, match=r"model\.zip is an exported model version: expected no .* got preset"
    ):
        imagestream.import_model(file, preset="raw", home=elsewhere)

    with pytest.raises(imagestream.ModelError, match="version 2 is the challenger"):
        imagestream.delete_version(2, home=home)
    assert imagestream.clear_challenger(home=home).version is None
    imagestream.delete_version(2, home=home)
    assert imagestream.model_versions(home) == [first]


@pytest.mark.parametrize("snippet", SNIPPETS, ids=["folder", "one by one", "tables", "follow", "models", "one file"])
def test_documented_snippet_runs(snippet: str, folder: Path, exports: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("IMAGESTREAM_")]:
        monkeypatch.delenv(name)
    output = StringIO()
    with chdir(folder), redirect_stdout(output), environment(**environment_of(Settings(backbones=exports))):
        exec(compile(snippet, "docs/python.md", "exec"), {})  # noqa: S102
    assert re.search(r"\d", output.getvalue())
