from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from examples.cifar10_mlp.__main__ import prepare
from examples.cifar10_mlp.generated import NAMES, TRAINING_BATCHES
from streaming.images.dataset import digit_images, write_images
from tests.examples.conftest import RunExample

PER_BATCH = 16
TRAINING = PER_BATCH * TRAINING_BATCHES


@pytest.fixture(scope="module")
def outcome(run_example: RunExample) -> dict[str, Any]:
    fit = ("--max-iter", 10)
    options = ("--per-batch", PER_BATCH, "--input-size", 96, *fit)
    return run_example("cifar10_mlp", *options, small={"train": ("--layers", 16, *fit)})


def test_training_images_become_vectors_of_3072_values_from_0_to_1(outcome: dict[str, Any]) -> None:
    rows = pq.read_table(outcome["home"] / "vectors.parquet")
    assert rows.num_rows == outcome["details"]["training images"] == TRAINING
    assert set(rows["label"].to_pylist()) == set(NAMES)
    assert rows.schema.field("features").type.value_type == "float"
    assert {len(vector) for vector in rows["features"]} == {3_072}
    values = rows["features"].combine_chunks().flatten().to_numpy()
    assert 0 <= values.min() < 0.1  # false for NaN
    assert 0.9 < values.max() <= 1


def test_stream_predicts_the_whole_test_batch_with_the_mlp(outcome: dict[str, Any]) -> None:
    assert (outcome["published"], outcome["streamed"]) == (PER_BATCH, PER_BATCH)
    assert (outcome["rows_in"], outcome["rows_out"]) == (TRAINING + PER_BATCH, TRAINING + PER_BATCH)
    assert len(list((outcome["home"] / "test").rglob("*.png"))) == PER_BATCH
    assert {Path(plot).name for plot in outcome["plots"]} == {"samples.png"}


def test_cnn_features_beat_the_mlp_on_pixels(outcome: dict[str, Any]) -> None:
    mlp, cnn = outcome["details"]["on the same held-out images"].values()
    assert outcome["value"] > 0.15
    assert cnn > max(0.6, mlp)
    mlp, cnn = outcome["details"][f"on the same {PER_BATCH} test images"].values()
    assert mlp == pytest.approx(outcome["value"], abs=1e-3)
    assert cnn > max(0.6, mlp)


def test_folders_of_image_files_are_used_directly(tmp_path: Path) -> None:
    for folder, count in (("train", 6), ("test", 3)):
        write_images(tmp_path / folder, digit_images(count))
    assert prepare(tmp_path, tmp_path / "unused") == (tmp_path / "train", tmp_path / "test", 6)
    assert not (tmp_path / "unused").exists()
