"""The whole loop on real digits: later labels improve the model, and the stream loads the new version."""

import csv
from hashlib import sha256
from pathlib import Path
from uuid import uuid4

import numpy as np
import pytest

from streaming.images.dataset import digit_images, write_images
from streaming.registry import CHAMPION, open_registry
from streaming.settings import Settings
from tests.conftest import imagestream
from tests.streaming.pipeline.test_stream import rows

KNOWN = set("012345")
FIRST, STREAMED, LATER = 400, 200, 20
SMALL = ("--backbone", "pixels", "--input-size", 14, "--projection", "none", "--max-iter", 8)


@pytest.fixture
def service(broker: Settings, tmp_path: Path) -> Settings:
    """A service whose champion was trained on six of the ten digits."""
    settings = broker.model_copy(update={"home": tmp_path / "home", "topic": f"images-{uuid4().hex[:8]}"})
    known = (image for image in digit_images(FIRST) if image[1] in KNOWN)
    folder = write_images(tmp_path / "known", known)
    assert imagestream(settings, "train", "--images", folder, *SMALL)["promoted"]
    return settings


def write_labels(path: Path, labels: dict[str, str]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image_id", "label"])
        writer.writerows(labels.items())
    return path


def test_later_labels_improve_the_model_and_wrong_labels_are_not_promoted(service: Settings, tmp_path: Path) -> None:
    images = list(digit_images(STREAMED, skip=FIRST))
    folder = tmp_path / "streamed"
    folder.mkdir()
    for name, _, data in images:
        (folder / name).write_bytes(data)
    imagestream(service, "publish", folder)  # without labels
    imagestream(service, "stream", "--until-drained")
    assert rows(service, "SELECT count(label_true) AS n FROM predictions") == [{"n": 0}]

    labels = {sha256(data).hexdigest(): label for _, label, data in images}
    imagestream(service, "label", write_labels(tmp_path / "labels.csv", labels))
    better = imagestream(service, "retrain")
    assert better["promoted"], better["why"]
    assert better["gain_above"] > 0
    assert better["metrics"]["accuracy"] > better["champion_metrics"]["accuracy"] + 0.05
    assert set(open_registry(service.home).read(better["version"]).manifest.classes) == set("0123456789")

    publish_more = write_images(tmp_path / "more", digit_images(LATER, skip=FIRST + STREAMED))
    imagestream(service, "publish", publish_more)
    imagestream(service, "stream", "--until-drained")
    by_version = rows(service, "SELECT model_version AS v, count(*) AS n FROM predictions GROUP BY 1 ORDER BY 1")
    assert by_version == [{"v": 1, "n": STREAMED}, {"v": better["version"], "n": LATER}]
    new = rows(service, "SELECT count(*) AS n FROM predictions WHERE label IN ('6', '7', '8', '9')")[0]["n"]
    assert new > 0

    shuffled = np.random.default_rng(0).permutation(list(labels.values()))
    imagestream(service, "label", write_labels(tmp_path / "wrong.csv", dict(zip(labels, shuffled, strict=True))))
    worse = imagestream(service, "retrain")
    assert not worse["promoted"], worse["why"]
    assert worse["gain"] < 0
    assert worse["version"] > better["version"]
    assert open_registry(service.home).target(CHAMPION) == better["version"]
