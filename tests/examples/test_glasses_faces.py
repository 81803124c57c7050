import csv
from pathlib import Path

import numpy as np
import pytest
import typer
from numpy.typing import NDArray
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from typer.testing import CliRunner

from examples.glasses_distributed.faces import WITH, WITHOUT, face, faces, main, write_folders, write_original_layout

N_TRAIN, N_TEST = 500, 200


Drawn = tuple[NDArray[np.float32], NDArray[np.bool_]]


@pytest.fixture(scope="module")
def drawn() -> Drawn:
    """Gray pictures (N, 64, 64), float32, and whether each face wears glasses."""
    pictures, labels = [], []
    for _, glasses, picture in faces(N_TRAIN + N_TEST, 64, 1):
        pictures.append(np.asarray(Image.fromarray(picture).convert("L"), np.float32))
        labels.append(glasses)
    return np.stack(pictures), np.array(labels)


def linear_accuracy(features: NDArray[np.float32], labels: NDArray[np.bool_]) -> float:
    """Accuracy of a logistic regression on (N, 64, 64) values, halved and standardised, with the best penalty."""
    halved = features.reshape(len(features), 32, 2, 32, 2).mean((2, 4))
    rows = StandardScaler().fit_transform(halved.reshape(len(features), -1))
    fits = (LogisticRegression(C=c, max_iter=100).fit(rows[:N_TRAIN], labels[:N_TRAIN]) for c in (1e-4, 1e-3, 1e-2))
    return max(float(fit.score(rows[N_TRAIN:], labels[N_TRAIN:])) for fit in fits)


def test_seed_determines_the_face() -> None:
    one, same, other = (face(np.random.default_rng(seed), 48, glasses=True) for seed in (1, 1, 2))
    assert one.shape == (48, 48, 3)
    assert one.dtype == np.uint8
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


def test_first_faces_do_not_depend_on_the_number_of_faces() -> None:
    few, many = (list(faces(n, 32, 3)) for n in (3, 6))
    for (number, glasses, picture), (its_number, its_glasses, its_picture) in zip(few, many, strict=False):
        assert (number, glasses) == (its_number, its_glasses)
        assert np.array_equal(picture, its_picture)


def test_half_of_the_faces_wear_glasses_in_random_order() -> None:
    wearers = [glasses for _, glasses, _ in faces(60, 16, 1)]
    assert sum(wearers) == 30
    assert len(set(wearers[::2])) == 2


def test_brightness_and_colour_vary_independently_of_the_class(drawn: Drawn) -> None:
    pictures, labels = drawn
    brightness = pictures.mean((1, 2))
    assert brightness.std() > 15
    assert abs(brightness[labels].mean() - brightness[~labels].mean()) < brightness.std() / 4


def test_linear_model_fails_on_pixels_and_succeeds_on_edges(drawn: Drawn) -> None:
    pictures, labels = drawn
    edges = np.hypot(*np.gradient(pictures, axis=(1, 2)))
    assert linear_accuracy(pictures, labels) < 0.75
    assert linear_accuracy(edges, labels) > 0.9


def test_class_folders_contain_every_face_once(tmp_path: Path) -> None:
    write_folders(tmp_path, 10, 32, 1)
    files = {name: sorted(path.name for path in (tmp_path / name).iterdir()) for name in (WITH, WITHOUT)}
    assert [len(names) for names in files.values()] == [5, 5]
    assert sorted(files[WITH] + files[WITHOUT]) == sorted(f"face-{number}.jpg" for number in range(1, 11))


def test_original_layout_names_pictures_by_id_and_leaves_some_labels_empty(tmp_path: Path) -> None:
    labels_csv = write_original_layout(tmp_path, 20, size=40, seed=1)
    with labels_csv.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    ids = {int(path.stem.removeprefix("face-")) for path in (tmp_path / "faces").glob("*.png")}
    assert {int(row["id"]) for row in rows} == ids == set(range(1, 21))
    assert sum(row["glasses"] == "" for row in rows) == 2
    truth = {number: str(int(glasses)) for number, glasses, _ in faces(20, 40, 1)}
    assert all(row["glasses"] in {"", truth[int(row["id"])]} for row in rows)
    with Image.open(tmp_path / "faces" / "face-1.png") as picture:
        assert picture.size == (40, 40)


def test_command_writes_the_requested_number_of_faces(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(main)
    done = CliRunner().invoke(app, [str(tmp_path), "--images", "6", "--size", "16", "--layout", "original"])
    assert done.exit_code == 0, done.output
    assert len(list((tmp_path / "faces").glob("*.png"))) == 6
