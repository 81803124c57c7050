"""The dashboard in a real browser, with a real broker and a running stream."""

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
from deltalake import DeltaTable

from streaming.dashboard.reader import Reader
from streaming.images.dataset import digit_images, write_images
from streaming.registry import open_registry
from streaming.settings import Settings
from tests.conftest import imagestream
from tests.streaming.browser import chromium, prefer, requested
from tests.streaming.dashboard.visitor import (
    PATIENCE_S,
    SCREENSHOTS,
    Visitor,
    environment_of,
    running_dashboard,
    wait_for,
)
from tests.streaming.small_models import bundle_folder

GOOD = 30  # more than a page of predictions
BAD = {
    "empty.png": b"",
    "notes.txt": b"this is text, not an image",
    "cut.jpg": b"\xff\xd8\xff\xe0\x00\x10JFIF\x00",
}


def rows(settings: Settings, sql: str) -> list[dict[str, Any]]:
    reader = Reader(settings.place)
    reader.version("predictions", "quarantine", "labels", "batches")
    return reader.rows(sql)


def champion(settings: Settings) -> int | None:
    """The version that predicts: 1 until a test promotes version 2."""
    return open_registry(settings.home).target("champion")


def images(folder: Path) -> list[Path]:
    """Labelled image files: digits, or fruits for screenshots in the documentation."""
    if SCREENSHOTS is None:
        return sorted(write_images(folder, digit_images(GOOD, skip=300)).rglob("*.png"))
    from examples.fruit_images import write_fruits

    return sorted(write_fruits(folder, 16).rglob("*.jpg"), key=lambda path: path.name)


def publish(settings: Settings, folder: Path, files: list[Path]) -> None:
    with chdir(folder):  # for short source names
        imagestream(settings, "publish", *(path.relative_to(folder) for path in files), "--label-from", "parent")


def publish_in_waves(settings: Settings, folder: Path) -> None:
    """For screenshots in the documentation: publish images at intervals."""
    files = [] if SCREENSHOTS is None else images(folder)
    for first in range(0, len(files), 80):
        publish(settings, folder, files[first : first + 80])
        time.sleep(4)


@pytest.fixture(scope="module")
def service(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """A new service with a second version to promote."""
    if SCREENSHOTS is None:
        settings: Settings = request.getfixturevalue("new_service")()
        registry = open_registry(settings.home)
        registry.register(lambda directory: copy_with_other_metrics(bundle_folder(settings.work_dir, 1), directory))
        return settings
    folder = tmp_path_factory.mktemp("fruits")
    images(folder / "training")
    broker = request.getfixturevalue("broker")
    settings = broker.model_copy(update={"home": folder / "home", "topic": "fruits"})
    for components in ("3", "40"):
        imagestream(settings, "train", "--images", folder / "training", "--components", components)
    registry = open_registry(settings.home)
    registry.promote(1, by="ops", why="first model")
    registry.promote(2, alias="challenger", by="ops", why="more images")
    return settings


def copy_with_other_metrics(source: Path, target: Path) -> None:
    shutil.copytree(source, target)
    manifest = target / "manifest.json"
    text = manifest.read_text(encoding="utf-8")
    manifest.write_text(text.replace('"holdout_rows": ', '"holdout_rows":  ', 1), encoding="utf-8")


@pytest.fixture(scope="module")
def streaming(service: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    """The service with a running stream, after GOOD predictions and three quarantined messages."""
    folder = tmp_path_factory.mktemp("published")
    for name, data in BAD.items():
        (folder / name).write_bytes(data)
    publish(service, folder, images(folder / "images")[:GOOD])
    with chdir(folder):
        imagestream(service, "publish", *BAD)
    log = folder / "stream.log"
    command = [sys.executable, "-m", "streaming", "--home", str(service.home), "stream"]
    with log.open("wb") as file:
        process = subprocess.Popen(command, env=environment_of(service), stdout=file, stderr=file)
    try:
        publish_in_waves(service, folder / "before")
        drained = "SELECT count(*) AS n FROM batches HAVING sum(input_rows) >= $n".replace("$n", str(GOOD + len(BAD)))
        wait_for(lambda: process.poll() is not None or rows(service, drained))
        assert process.poll() is None, log.read_text()
        yield service
        process.terminate()
        assert process.wait(PATIENCE_S) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def visitor(streaming: Settings) -> Iterator[Visitor]:
    """A browser on the dashboard of the running service."""
    with running_dashboard(streaming) as address, chromium(width=1400) as chrome:
        yield Visitor(chrome, address)


def test_uploaded_image_is_published_and_its_prediction_appears(
    visitor: Visitor, streaming: Settings, tmp_path: Path
) -> None:
    image = images(tmp_path)[-1]
    before = rows(streaming, "SELECT count(*) AS n FROM predictions")[0]["n"]
    visitor.open("upload")
    wait_for(lambda: visitor.all("input[type=file]"))[0].send_keys(str(image))
    visitor.waits_for_text(image.name)

    visitor.click("Publish")
    visitor.waits_for_text(rf"model version {champion(streaming)} · .* after publishing")

    (row,) = rows(streaming, "SELECT label, source FROM predictions ORDER BY scored_at DESC LIMIT 1")
    assert row["source"] == f"dashboard/{image.name}"
    assert row["label"] in visitor.text()
    assert rows(streaming, "SELECT count(*) AS n FROM predictions")[0]["n"] == before + 1
    visitor.show("upload")


def test_promoted_version_predicts_the_next_upload(visitor: Visitor, streaming: Settings, tmp_path: Path) -> None:
    visitor.open("models")
    visitor.waits_for_text("2")
    visitor.click("Promote")
    visitor.click("Confirm promotion")
    visitor.waits_for_text(r"champion: version 2 \(before: 1\)")
    (move,) = open_registry(streaming.home).history("champion")[-1:]
    assert (move.version, move.by) == (2, "dashboard")
    visitor.open("upload")
    image = images(tmp_path)[-2]
    wait_for(lambda: visitor.all("input[type=file]"))[0].send_keys(str(image))
    visitor.waits_for_text(image.name)
    visitor.click("Publish")
    visitor.waits_for_text(r"model version 2 · .* after publishing")


def test_live_page_shows_state_lag_model_and_charts(visitor: Visitor, streaming: Settings, tmp_path: Path) -> None:
    publish_in_waves(streaming, tmp_path)
    visitor.open("")
    visitor.waits_for_text("streaming")
    visitor.waits_for_text(r"Lag\D*0\b")
    visitor.waits_for_text(rf"Model\D*v{champion(streaming)}")
    charts = "[data-testid=stVegaLiteChart] canvas, [data-testid=stVegaLiteChart] svg"
    wait_for(lambda: len(visitor.all(charts)) >= 3)
    visitor.show("live")
    visitor.open("models")
    visitor.waits_for_text(rf"Champion\D*v{champion(streaming)}")
    visitor.show("models")


def test_replayed_messages_are_published_again(visitor: Visitor, streaming: Settings) -> None:
    visitor.open("quarantine")
    visitor.waits_for_text("not_an_image")
    visitor.show("quarantine")
    visitor.click("Replay 3 messages")
    visitor.click("Confirm replay")
    visitor.waits_for_text("Sent 3 of 3 messages")
    marked = "SELECT count(*) AS n FROM quarantine WHERE replayed_at IS NOT NULL"
    assert rows(streaming, marked) == [{"n": 3}]
    # They are quarantined again.
    wait_for(lambda: rows(streaming, "SELECT count(*) AS n FROM quarantine") == [{"n": 6}])


def test_given_label_is_in_the_table_and_on_the_page(visitor: Visitor, streaming: Settings) -> None:
    visitor.open("predictions")
    visitor.click("Open")
    visitor.waits_for_text("True label")
    visitor.waits_for_text("published")
    visitor.choose("True label", "quince")
    visitor.click("Save label")
    visitor.waits_for_text("Saved: quince")
    visitor.show("prediction")

    (label,) = DeltaTable(streaming.place.table("labels")).to_pandas().to_dict("records")
    assert (label["label"], label["by"]) == ("quince", "dashboard")
    assert label["image_id"] in visitor.text()


def test_predictions_show_images_and_are_filtered(visitor: Visitor, streaming: Settings) -> None:
    visitor.open("predictions")
    wait_for(lambda: len(visitor.all("[data-testid=stImage] img")) == 24)
    assert all(one.get_property("naturalWidth") for one in visitor.all("[data-testid=stImage] img"))
    visitor.show("predictions")
    (first,) = rows(streaming, "SELECT label, count(*) AS n FROM predictions GROUP BY ALL ORDER BY n DESC LIMIT 1")
    visitor.choose("Label", first["label"])
    visitor.waits_for_text(rf"{first['n']} predictions")


def test_drift_page_compares_with_the_training_images(visitor: Visitor) -> None:
    visitor.open("drift")
    visitor.waits_for_text("Population stability index")
    visitor.show("drift")


def test_pages_request_nothing_from_other_hosts(visitor: Visitor) -> None:
    own = visitor.address.removeprefix("http://")
    assert {url.split("/")[2] for url in requested(visitor.chrome) if url.startswith(("http", "ws"))} <= {own}


def test_pages_are_dark_if_the_browser_prefers_it(visitor: Visitor) -> None:
    colour = "return getComputedStyle(document.querySelector('.stApp')).backgroundColor"
    prefer(visitor.chrome, dark=True)
    try:
        for page, name in (("", "live"), ("predictions", "predictions"))[: 1 if SCREENSHOTS is None else 2]:
            visitor.load(page)
            found = visitor.chrome.execute_script(colour)
            assert max(map(int, re.findall(r"\d+", found)[:3])) < 100, found
            visitor.show(f"{name}-dark")
    finally:
        prefer(visitor.chrome, dark=False)
