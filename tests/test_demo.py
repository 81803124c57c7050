"""The demo: as users run it in `make soak`, and with fewer and smaller images in `make test`."""

import shlex
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import DeltaTable, QueryBuilder

from streaming.cli.demo import NEXT
from streaming.jobs import demo
from streaming.jobs.demo_home import new_demo_home
from streaming.settings import Settings
from tests.conftest import command_here, imagestream, imagestream_process
from tests.forms import Form
from tests.test_readme import block_with, run_block

SMALL = ("--input-size", 64, "--max-iter", 10)


def run_small_demo(settings: Settings) -> dict[str, Any]:
    """Run the demo in this process and its Spark session, except for the stream, with fewer and smaller images."""
    # So few images cannot show non-inferiority of the new model within the margin of the demo.
    small = {"TRAINING": 200, "FIRST": 60, "MORE": 20, "HAND_OVER_MARGIN": -0.9}

    def run(demo_settings: Settings, *arguments: str | Path) -> None:
        imagestream(demo_settings, *arguments, *(SMALL if arguments[0] == "train" else ()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "_imagestream", run)
        for name, value in small.items():
            patch.setattr(demo, name, value)
        return imagestream(settings, "demo")


def test_demo_predicts_every_image_once_and_promotes_the_retrained_model(
    jars_dir: Path, exports: Path, tmp_path: Path, form: Form[Any]
) -> None:
    home = tmp_path / ".imagestream"
    settings = Settings(home=home, jars=jars_dir, backbones=exports)

    found = form(imagestream_process, run_small_demo)(settings, *form(["demo"], []))

    first, more = form((500, 100), (60, 20))
    assert found["published"] == first + more + 5
    assert found["predicted"] == first + more
    assert found["quarantined"] == 5
    assert found["duplicates"] == 0
    assert found["model_versions"] == {"1": first, "2": more}
    assert found["accuracy"] >= form(0.90, 0.5)
    assert found["images_per_second"] > 0
    home = home / "demo"
    assert (home / "report.png").read_bytes().startswith(b"\x89PNG")

    # Another reader gets the same counts from the tables alone.
    builder = QueryBuilder()
    for name, path in found["tables"].items():
        builder = builder.register(name, DeltaTable(path))
    sql = """
        SELECT (SELECT count(*) FROM predictions) AS predicted, (SELECT count(*) FROM quarantine) AS quarantined,
               (SELECT count(*) FROM predictions WHERE label = label_true) AS correct
    """
    totals = pa.table(builder.execute(sql).read_all()).to_pylist()[0]
    assert (totals["predicted"], totals["quarantined"]) == (first + more, 5)
    assert totals["correct"] / (first + more) == found["accuracy"]

    # Its processes have exited, and SQL works without them.
    assert command_here("--home", home, "broker", "status")[0] == 1
    for command in NEXT:
        if command != "dashboard":
            code, _, err = command_here("--home", home, *shlex.split(command))
            assert code == 0, err
    outputs = run_block(block_with("imagestream query"), tmp_path)
    assert len(outputs) == 3
    assert all(reason in outputs[2] for reason in ("not_an_image", "Truncated File Read", "the message has 0 bytes"))

    # A second run deletes the earlier demo only with --yes.
    refused = imagestream(settings, "demo", code=1)["stderr"]
    assert f"Remove the earlier demo in {home}? Confirm with --yes" in refused
    new_demo_home(settings, lambda _: True)
    assert not (home / "tables").exists()
