"""Images in a bucket: found, labelled and published like those in a local folder."""

import json
from pathlib import Path
from uuid import uuid4

import pytest

from models.decode import Limits
from streaming.cli import commands  # noqa: F401  registers every command
from streaming.errors import ServiceError
from streaming.images.dataset import digit_images, read_dataset
from streaming.images.image_folder import ARCHIVE, HIDDEN, NOT_AN_IMAGE
from streaming.images.sources import ReadAhead, place_of, read_source, read_start
from streaming.settings import Settings
from streaming.storage.store import open_store
from tests.conftest import imagestream
from tests.object_store import BUCKET, ObjectStoreServer

DIGITS = list(digit_images(24))


@pytest.fixture
def folder(object_store: ObjectStoreServer, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URI of a folder in the bucket, with the credentials in the environment."""
    for name, value in object_store.environment().items():
        monkeypatch.setenv(name, value)
    return f"s3://{BUCKET}/photos-{uuid4().hex}"


@pytest.fixture
def digits(folder: str) -> str:
    store = open_store(folder)
    for name, label, data in DIGITS:
        store.put(f"{label}/{name}", data)
    return folder


def test_images_have_the_label_of_their_folder(digits: str) -> None:
    for name in ("3/notes.txt", "all.zip", "__MACOSX/3/1.png"):
        open_store(digits).put(name, b"no image")
    found = read_dataset(place_of(f"{digits}/"))
    assert {(file.path, file.label) for file in found.files} == {
        (f"{digits}/{label}/{name}", label) for name, label, _ in DIGITS
    }
    assert found.dropped == {NOT_AN_IMAGE: 1, ARCHIVE: 1, HIDDEN: 1}
    assert next(found.sample_images(1)) in {data for _, _, data in DIGITS}
    assert {read_source(file.path) for file in found.files} == {data for _, _, data in DIGITS}


def test_labels_come_from_a_csv_or_from_metadata_in_the_bucket(digits: str, tmp_path: Path) -> None:
    labels = tmp_path / "labels.csv"
    rows = [f"{label}/{name},{'even' if int(label) % 2 == 0 else 'odd'}" for name, label, _ in DIGITS]
    labels.write_text("\n".join(["path,label", *rows]))
    by_csv = read_dataset(digits, labels_csv=labels).class_counts
    assert set(by_csv) == {"even", "odd"}
    lines = [json.dumps(dict(zip(("file_name", "label"), row.split(","), strict=True))) for row in rows]
    open_store(digits).put("metadata.jsonl", "\n".join(lines).encode())
    assert read_dataset(digits).class_counts == by_csv


def test_empty_folder_and_unsupported_scheme_are_rejected(folder: str) -> None:
    with pytest.raises(ServiceError, match=r"^s3://.* contains no images: expected one folder of images per class"):
        read_dataset(folder)
    with pytest.raises(ServiceError, match=r"expected a path or a URI that begins with s3://.*, got hdfs://"):
        place_of("hdfs://namenode/photos")


def test_reading_stops_at_the_size_limit_of_an_image(digits: str) -> None:
    name, label, data = DIGITS[0]
    uri = f"{digits}/{label}/{name}"
    assert read_source(uri, Limits(max_bytes=10)) == data[:11]
    with pytest.raises(FileNotFoundError):
        read_source(f"{digits}/nothing.png")


def test_read_ahead_returns_the_requested_images(digits: str) -> None:
    uris = [f"{digits}/{label}/{name}" for name, label, _ in DIGITS]
    ahead = ReadAhead([uris[0], f"{digits}/gone.png", *uris[1:]])
    try:
        assert ahead(uris[0], 10**6) == DIGITS[0][2]
        with pytest.raises(FileNotFoundError):
            ahead(f"{digits}/gone.png", 10**6)
        assert ahead(uris[5], 8) == DIGITS[5][2]  # images in between were skipped; it was read with the first limit
        assert read_start(uris[6], 8) == DIGITS[6][2][:8]
    finally:
        ahead.close()


def test_folder_of_a_bucket_can_be_published(digits: str, broker: Settings) -> None:
    settings = broker.model_copy(update={"topic": f"bucket-{uuid4().hex[:8]}"})
    summary = imagestream(settings, "publish", "--topic", settings.topic, "--label-from", "parent", digits)
    assert (summary["sent"], summary["complete"]) == (len(DIGITS), True)
    alone = imagestream(settings, "publish", "--topic", settings.topic, f"{digits}/{DIGITS[0][1]}/{DIGITS[0][0]}")
    assert alone["sent"] == 1
    missing = imagestream(settings, "publish", "--topic", settings.topic, f"{digits}/nothing.png", code=1)
    assert [(one["path"], one["reason"]) for one in missing["skipped"]] == [(f"{digits}/nothing.png", "unreadable")]
