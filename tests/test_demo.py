"""The demo, as a newcomer runs it."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
from deltalake import DeltaTable, QueryBuilder

from streaming.settings import Settings
from tests.conftest import imagestream


def test_the_demo_answers_every_image_once_and_hands_over_to_the_retrained_model(
    jars_dir: Path, exports: Path, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    settings = Settings(home=home, jars=jars_dir, backbones=exports)

    found = imagestream(settings, "demo")

    assert found["published"] == 605
    assert found["predicted"] == 600
    assert found["quarantined"] == 5
    assert found["duplicates"] == 0
    assert found["model_versions"] == {"1": 500, "2": 100}
    assert found["accuracy"] >= 0.90
    assert found["images_per_second"] > 0
    assert (home / "report.png").read_bytes().startswith(b"\x89PNG")

    # The same figures from the tables alone, by another reader.
    builder = QueryBuilder()
    for name, path in found["tables"].items():
        builder = builder.register(name, DeltaTable(path))
    sql = """
        SELECT (SELECT count(*) FROM predictions) AS predicted, (SELECT count(*) FROM quarantine) AS quarantined,
               (SELECT count(*) FROM predictions WHERE label = label_true) AS correct
    """
    totals = pa.table(builder.execute(sql).read_all()).to_pylist()[0]
    assert (totals["predicted"], totals["quarantined"]) == (600, 5)
    assert totals["correct"] / 600 == found["accuracy"]

    # Its processes are gone, and SQL needs none of them.
    status = subprocess.run(
        [sys.executable, "-m", "streaming", "--home", str(home), "broker", "status"], capture_output=True, check=False
    )
    assert status.returncode == 1
    sql = "SELECT label, count(*) AS n FROM predictions GROUP BY label"
    answer = subprocess.run(
        [sys.executable, "-m", "streaming", "--home", str(home), "query", "--format", "json", sql],
        capture_output=True,
        check=True,
    )
    assert sum(row["n"] for row in json.loads(answer.stdout)) == 600


def test_the_demo_refuses_a_home_with_tables_of_somebody_else(jars_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "tables" / "predictions").mkdir(parents=True)
    said = imagestream(Settings(home=tmp_path, jars=jars_dir), "demo", code=1)["stderr"]
    assert "holds tables that the demo did not make" in said
    assert (tmp_path / "tables" / "predictions").is_dir()
