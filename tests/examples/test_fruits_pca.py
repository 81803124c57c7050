from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from examples.fruit_images import FRUITS
from tests.examples.conftest import RunExample

PER_CLASS = 3
IMAGES = PER_CLASS * len(FRUITS)


@pytest.fixture(scope="module")
def outcome(run_example: RunExample) -> dict[str, Any]:
    options = ("--backbone", "cnn_color", "--weights", "random", "--per-class", PER_CLASS)
    return run_example("fruits_pca", *options, small={"train": ("--max-iter", 10)})


def test_every_image_has_a_row_with_the_label_of_its_folder(outcome: dict[str, Any]) -> None:
    rows = pd.read_csv(outcome["home"] / "features.csv")
    assert (outcome["rows_in"], outcome["rows_out"], len(rows)) == (IMAGES, IMAGES, IMAGES)
    k = outcome["details"]["components"]
    assert list(rows.columns) == ["path", "label", *(f"pca_{number}" for number in range(1, k + 1))]
    assert set(rows["path"]) == set(map(str, (outcome["home"] / "images").rglob("*.jpg")))
    assert [Path(path).parent.name for path in rows["path"]] == list(rows["label"])
    assert dict(rows["label"].value_counts()) == {fruit.folder: PER_CLASS for fruit in FRUITS}


def test_components_are_the_fewest_that_explain_90_percent_of_the_variance(outcome: dict[str, Any]) -> None:
    rows = pd.read_csv(outcome["home"] / "features.csv").filter(like="pca_")
    variances = rows.var().to_numpy()
    assert (variances[:-1] >= variances[1:]).all()
    kept = outcome["details"]["variance kept"]
    assert kept >= 0.9
    assert kept * (1 - variances[-1] / variances.sum()) < 0.9


def test_parquet_and_csv_contain_the_same_rows(outcome: dict[str, Any]) -> None:
    csv_rows = pd.read_csv(outcome["home"] / "features.csv")
    parquet_rows = pd.read_parquet(outcome["home"] / "features.parquet")
    assert list(parquet_rows["path"]) == list(csv_rows["path"])
    assert list(parquet_rows["label"]) == list(csv_rows["label"])
    for wide, narrow in zip(parquet_rows["features"], csv_rows.filter(like="pca_").to_numpy(), strict=True):
        assert wide == pytest.approx(narrow, abs=1e-4)


def test_stream_predicts_every_image_with_the_registered_model(outcome: dict[str, Any]) -> None:
    assert (outcome["published"], outcome["streamed"]) == (IMAGES, IMAGES)
    assert outcome["value"] > 3 / len(FRUITS)  # three times chance
    assert {Path(plot).name for plot in outcome["plots"]} == {"variance.png", "samples.png"}
    assert all(Path(plot).read_bytes().startswith(b"\x89PNG") for plot in outcome["plots"])
