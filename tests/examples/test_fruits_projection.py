import csv
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from sklearn.random_projection import johnson_lindenstrauss_min_dim

from examples.fruit_images import FRUITS
from models.random_projection import johnson_lindenstrauss_dim
from tests.examples.conftest import RunExample

PER_CLASS = 2
IMAGES = PER_CLASS * len(FRUITS)


@pytest.fixture(scope="module")
def outcome(run_example: RunExample) -> dict[str, Any]:
    options = ("--weights", "random", "--per-class", PER_CLASS)
    return run_example("fruits_projection", *options, small={"train": ("--max-iter", 10)})


def test_labels_are_folder_names_without_trailing_numbers(outcome: dict[str, Any]) -> None:
    rows = pd.read_parquet(outcome["home"] / "features" / "features.parquet")
    assert (outcome["rows_in"], outcome["rows_out"], len(rows)) == (IMAGES, IMAGES, IMAGES)
    assert [re.sub(r"_\d+$", "", Path(path).parent.name) for path in rows["path"]] == list(rows["label"])
    assert {"Cherry Wax Black", "Limón", "Pêche de vigne 2"} <= set(rows["label"]) < {one.folder for one in FRUITS} | {
        "Cherry Wax Black", "Grape White", "Limón",
    }  # fmt: skip


def test_width_is_the_johnson_lindenstrauss_bound_for_the_number_of_images(outcome: dict[str, Any]) -> None:
    assert outcome["details"]["components"] == johnson_lindenstrauss_min_dim(IMAGES, eps=0.1)


def test_original_width_was_computed_from_the_number_of_features() -> None:
    assert johnson_lindenstrauss_dim(22_688, 0.1) == johnson_lindenstrauss_min_dim(22_688, eps=0.1) == 8_596
    assert johnson_lindenstrauss_dim(7 * 7 * 1_280, 0.1) == 9_468


def test_pandas_deltalake_and_duckdb_read_the_same_rows_labels_and_width(outcome: dict[str, Any]) -> None:
    labels = len({re.sub(r"_\d+$", "", fruit.folder) for fruit in FRUITS})
    shape = [IMAGES, labels, outcome["details"]["components"]]
    assert outcome["details"]["read back (rows, labels, width)"] == dict.fromkeys(
        ["pandas", "deltalake", "duckdb"], shape
    )


def test_stream_predicts_every_image_for_any_folder_name(outcome: dict[str, Any]) -> None:
    assert (outcome["published"], outcome["streamed"]) == (IMAGES, IMAGES)
    assert outcome["details"]["accuracy of the stream, on images it was fitted on, too"] > 0.5
    with (outcome["home"] / "labels.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == IMAGES
