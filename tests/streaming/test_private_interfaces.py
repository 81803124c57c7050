"""The private interfaces of libraries that are used still exist, and each is used in one place."""

import re
import zipfile
from pathlib import Path
from typing import Any

import pyspark
import pytest
from pyspark.ml.param import Params

ROOT = Path(__file__).parent.parent.parent / "streaming"


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("_dummy", "ml/params.py"),
        ("_resetUid", "ml/storage.py"),
        ("_server_mode", "dashboard/server.py"),
        ("__globPaths__", "images/images_frame.py"),
    ],
)
def test_private_interface_is_used_in_one_place(name: str, place: str) -> None:
    uses = [path for path in ROOT.rglob("*.py") for _ in re.findall(rf"\b{name}\b", path.read_text(encoding="utf-8"))]
    assert uses == [ROOT / place]


def test_spark_ml_declares_params_and_restores_ids_as_expected() -> None:
    class Stage(Params):
        pass

    stage = Stage()
    assert Params._dummy().uid == "undefined"
    assert stage._resetUid("restored") is stage
    assert stage.uid == "restored"


def test_streamlit_has_the_mode_that_the_dashboard_selects() -> None:
    config: Any = pytest.importorskip("streamlit.config")
    assert "starlette-app" in Path(config.__file__).read_text(encoding="utf-8")
    assert hasattr(config, "_server_mode")


def test_spark_still_has_the_option_that_takes_paths_literally() -> None:
    (jar,) = (Path(pyspark.__file__).parent / "jars").glob("spark-sql_*.jar")
    with zipfile.ZipFile(jar) as classes:
        source = classes.read("org/apache/spark/sql/execution/datasources/DataSource$.class")
    assert b"__globPaths__" in source
