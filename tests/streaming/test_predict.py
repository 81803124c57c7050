"""Predictions without a stream; `pipeline/test_stream.py` compares them with those of the stream."""

import csv
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler
from io import BytesIO, StringIO
from itertools import islice, repeat
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

from streaming.errors import ServiceError
from streaming.images.dataset import digit_images, write_images
from streaming.predict import CHUNK, Model, PredictionList, load
from streaming.settings import Settings
from tests.conftest import CHECKOUT, command_here, environment, environment_of
from tests.http_server import QuietHandler, http_server

DIGITS = 6
MANY = 20_000  # more images than are predicted before a process is stopped


@pytest.fixture(scope="module")
def settings(trained: Path, exports: Path) -> Iterator[Settings]:
    """Settings of the shared home, which is only read."""
    settings = Settings(home=trained, backbones=exports)
    with environment(IMAGESTREAM_HOME=str(trained), **environment_of(settings)):
        yield settings


@pytest.fixture(scope="module")
def model(settings: Settings) -> Model:
    return load(threads=2)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six digits, a text file, an empty file, a link to the folder itself, and a pipe."""
    folder = tmp_path_factory.mktemp("photos")
    write_images(folder, digit_images(DIGITS, 300))
    (folder / "notes.txt").write_text("this is text")
    (folder / "nothing.jpg").touch()
    (folder / "again").symlink_to(folder)
    os.mkfifo(folder / "pipe")
    return folder


def answers(predictions: PredictionList) -> list[tuple[Any, ...]]:
    """The predictions without the names of the images."""
    return [(one.label, one.confidence, one.top_k, one.reason) for one in predictions]


def test_each_file_of_a_folder_has_a_prediction_or_a_reason(model: Model, photos: Path) -> None:
    found = model.predict(photos, top=4)
    names = [Path(one.source or "").relative_to(photos).as_posix() for one in found]
    files = [
        path.relative_to(photos).as_posix() for path in photos.rglob("*") if path.is_file() and not path.is_symlink()
    ]
    files = [name for name in files if not name.startswith("again/")]
    assert names == sorted(files, key=lambda name: Path(name).parts)
    by_name = dict(zip(names, found, strict=True))
    assert (by_name["notes.txt"].stage, by_name["notes.txt"].reason) == ("decode", "not_an_image")
    assert (by_name["nothing.jpg"].stage, by_name["nothing.jpg"].reason) == ("read", "empty")
    good = [one for one in found if one.reason is None]
    assert len(good) == DIGITS
    for one in good:
        assert one.top_k[0] == (one.label, one.confidence)
        assert len(one.top_k) == 4
        assert [probability for _, probability in one.top_k] == sorted((p for _, p in one.top_k), reverse=True)
        assert one.image_id == hashlib.sha256(Path(one.source or "").read_bytes()).hexdigest()


def test_paths_bytes_and_pillow_images_give_equal_predictions(model: Model, photos: Path) -> None:
    paths = [path for path in sorted(photos.rglob("*.png")) if "again" not in path.parts][:3]
    expected = answers(model.predict(paths))
    assert answers(model.predict([path.read_bytes() for path in paths])) == expected
    assert answers(model.predict(iter([Image.open(path) for path in paths]))) == expected
    assert (
        answers(model.predict(str(paths[0])))
        == answers(model.predict(memoryview(paths[0].read_bytes())))
        == expected[:1]
    )


def test_pillow_image_is_rotated_by_its_exif_orientation(model: Model, photos: Path) -> None:
    image, exif, file = Image.open(next(iter(photos.rglob("*.png")))).convert("RGB"), Image.Exif(), BytesIO()
    exif[0x0112] = 6  # orientation: rotated by 90 degrees
    image.save(file, "PNG", exif=exif)
    rotated, of_bytes, original = model.predict([Image.open(file), file.getvalue(), image])
    assert answers(PredictionList([rotated])) == answers(PredictionList([of_bytes]))
    assert rotated.confidence != original.confidence
    cmyk = image.convert("CMYK")  # not supported by PNG
    assert answers(model.predict(cmyk)) == answers(model.predict(cmyk.convert("RGB")))


def test_unreadable_image_has_a_reason(model: Model, photos: Path, tmp_path: Path) -> None:
    with http_server(partial(_Files, directory=photos)) as server:
        digit = next(iter(photos.rglob("*.png")))
        url = f"{server}/{digit.relative_to(photos).as_posix()}"
        missing, gone, read = model.predict([photos / "missing.jpg", f"{url}.gone", url])
    assert (missing.stage, missing.reason, missing.detail) == ("read", "unreadable", "No such file or directory")
    assert (gone.reason, gone.label) == ("unreadable", None)
    assert "404" in (gone.detail or "")
    assert answers(PredictionList([read])) == answers(model.predict(digit))
    (tmp_path / "broken.jpg").symlink_to("missing")
    [broken] = model.predict(tmp_path)
    assert (broken.reason, broken.detail) == ("unreadable", "broken symbolic link")


class _Files(QuietHandler, SimpleHTTPRequestHandler):
    """Serves a folder."""


def test_images_are_read_lazily(model: Model, photos: Path) -> None:
    digit = next(iter(photos.rglob("*.png"))).read_bytes()
    taken = iter(range(1_000_000))

    def images() -> Iterator[bytes]:  # infinite
        for _ in repeat(None):
            next(taken)
            yield digit

    predictions = model.predict_each(images())
    assert len(list(islice(predictions, 2 * CHUNK))) == 2 * CHUNK
    predictions.close()  # type: ignore[attr-defined]
    assert next(taken) <= 2 * CHUNK + 2 * 2 * CHUNK


@pytest.mark.parametrize("images", [7, [7], [["photo.jpg"]], None])
def test_images_of_a_wrong_type_are_refused(model: Model, images: Any) -> None:
    with pytest.raises(TypeError, match="images: expected"):
        model.predict(images)


@pytest.mark.parametrize(("wanted", "why"), [("winner", "expected a model's version"), ("challenger", "no challenger")])
def test_missing_model_is_reported(settings: Settings, wanted: str, why: str) -> None:
    with pytest.raises(ServiceError, match=why):
        load(wanted)


def test_predictions_convert_to_pandas_and_arrow(model: Model, photos: Path) -> None:
    found = model.predict(photos)
    frame = found.to_pandas()
    assert list(frame["source"]) == [one.source for one in found]
    assert set(frame["reason"].dropna()) == {"not_an_image", "empty"}
    assert found.to_arrow().to_pylist() == [one.as_dict() for one in found]


def test_command_writes_only_rows_to_standard_output(
    settings: Settings, model: Model, photos: Path, tmp_path: Path
) -> None:
    summary = tmp_path / "summary.json"
    code, out, err = command_here("predict", photos, "--top", 2, "--format", "csv", "--json", summary)
    rows = list(csv.DictReader(StringIO(out)))
    expected = model.predict(str(photos), top=2)
    assert [(row["source"], row["label"], row["reason"]) for row in rows] == [
        (one.source, one.label or "", one.reason or "") for one in expected
    ]
    assert code == 1  # two have no prediction
    assert "2 without a prediction: 1 empty, 1 not_an_image" in err
    written = json.loads(summary.read_text())
    assert (written["images"], written["predicted"], written["bad"]) == (
        DIGITS + 2,
        DIGITS,
        {"empty": 1, "not_an_image": 1},
    )

    digit = next(iter(photos.rglob("*.png")))
    code, out, _ = command_here("predict", digit, "--model", 1, "--format", "json")
    assert (code, json.loads(out)[0]["label"]) == (0, model.predict(digit)[0].label)
    expected_row = model.predict(str(digit))[0].as_dict()
    _, out, _ = command_here("predict", digit, "--format", "ndjson")
    assert json.loads(out) == expected_row
    command_here("predict", digit, "--format", "parquet", "--output", tmp_path / "rows.parquet")
    assert pq.read_table(tmp_path / "rows.parquet").to_pylist() == [expected_row]
    (tmp_path / "empty").mkdir()
    code, _, err = command_here("predict", tmp_path / "empty", "--model", "1")
    assert (code != 0, "expected images" in err) == (True, True)


def test_process_does_not_load_spark_and_stops_on_sigterm(settings: Settings, photos: Path, tmp_path: Path) -> None:
    digit = next(iter(photos.rglob("*.png")))
    source = f"import sys\nfrom streaming.predict import load\nload().predict({str(digit)!r})\nprint(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", source], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in modules.stdout.split()}
    assert "ai_edge_litert" in loaded
    assert not loaded & {"pyspark", "py4j", "tensorflow", "keras", "kafka", "pandas", "sklearn"}

    many = tmp_path / "many"
    many.mkdir()
    for number in range(MANY):
        (many / f"{number}.png").symlink_to(digit)
    command = [sys.executable, "-m", "imagestream", "predict", many, "--format", "csv"]
    with subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        lines = list(islice(process.stdout, 20))
        process.send_signal(signal.SIGTERM)
        rest, err = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "stopped by SIGTERM; the rows written so far are complete" in err
    assert len(lines) + len(rest.splitlines()) < MANY
