import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import examples.__main__ as runner
from examples.memory import MemoryWatch
from examples.service import Service
from streaming.errors import ServiceError
from tests.conftest import CHECKOUT

OUTCOME = {
    "example": "fruits_pca", "rows_in": 1_200, "rows_out": 1_200, "metric": "accuracy", "value": 0.75,
    "original": "k = 185", "published": 1_200, "streamed": 1_200, "plots": [], "details": {},
}  # fmt: skip


def example_run(**changes: object) -> runner.Run:
    return runner.Run("fruits_pca", OUTCOME | changes, 61.4, 3_210_000_000, 1_100_000_000)


def test_table_row_has_counts_metric_seconds_and_memory() -> None:
    cells = example_run().cells()
    assert len(cells) == len(runner.COLUMNS)
    assert cells == [
        "fruits_pca", "1,200", "1,200", "0.7500 accuracy", "k = 185", "61", "3.2 GB, of which Spark's JVM 1.1"
    ]  # fmt: skip


@pytest.mark.parametrize("changes", [{"rows_out": 1_199}, {"streamed": 1_199}])
def test_run_that_lost_an_image_or_a_message_is_incomplete(changes: dict[str, int]) -> None:
    assert example_run().complete
    assert not example_run(**changes).complete
    assert not runner.Run("fruits_pca", None, 1.0, 0, 0).complete


def test_docs_table_and_plots_are_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "examples.md"
    monkeypatch.setattr(runner, "DOCS", tmp_path)
    monkeypatch.setattr(runner, "PAGE", page)
    page.write_text(f"before\n{runner.BEGIN}old\n{runner.END}after\n", encoding="utf-8")
    Image.new("RGB", (4, 4), "red").save(tmp_path / "roc.png")
    runner.write_docs([example_run(plots=[str(tmp_path / "roc.png")])])
    runner.write_docs([example_run(plots=[str(tmp_path / "roc.png")])])
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert text.count("| fruits_pca | 1,200 | 1,200 |") == 1
    assert "](examples/fruits_pca-roc.png)" in text
    with Image.open(tmp_path / "examples" / "fruits_pca-roc.png") as image:
        assert image.size == (4, 4)


def test_every_example_has_a_script_a_readme_and_a_docs_link() -> None:
    page = (CHECKOUT / "docs" / "examples.md").read_text(encoding="utf-8")
    for name in runner.EXAMPLES:
        folder = CHECKOUT / "examples" / name
        assert (folder / "__main__.py").is_file()
        assert f"python -m examples.{name}" in (folder / "README.md").read_text(encoding="utf-8")
        assert f"../examples/{name}/README.md" in page


def test_unknown_example_is_reported_in_one_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "examples", "fruit_pca"], cwd=CHECKOUT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr == f"error: unknown example fruit_pca; expected one of {', '.join(runner.EXAMPLES)}\n"


def test_home_with_tables_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "home" / "tables").mkdir(parents=True)
    with pytest.raises(ServiceError, match="already contains tables: remove it, or set another home with --home"):
        Service.new("fruits_pca", tmp_path / "home")


def test_failing_command_stops_the_example(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    service = Service.new("fruits_pca", tmp_path / "home")
    with pytest.raises(ServiceError, match="'imagestream train' failed; see its error above"):
        service.run("train", "--images", tmp_path / "nothing")
    output = capfd.readouterr()
    assert f"$ imagestream --home {service.home} train --images {tmp_path / 'nothing'}" in output.out
    assert "is not a folder" in output.err


def test_peak_memory_includes_child_processes() -> None:
    child = "import time; data = bytearray(80_000_000); time.sleep(2.5)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {json.dumps(child)}])"
    with subprocess.Popen([sys.executable, "-c", parent]) as process, MemoryWatch(process.pid) as memory:
        process.wait()
    assert 80e6 < memory.peak < 400e6
    assert memory.peaks.java == 0
