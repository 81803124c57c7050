"""Thumbnails of images that are stored only in Kafka, from a real broker."""

import hashlib
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from streaming.dashboard.pictures import ImageRef, Pictures
from streaming.images.dataset import digit_images
from streaming.settings import Settings
from tests.streaming.history import new_topic

HOSTILE = b"\x89PNG\r\n\x1a\n" + b"\xff" * 200


@pytest.fixture(scope="module")
def published(broker: Settings) -> tuple[Settings, list[ImageRef]]:
    """A topic with 30 digits and a message that is not an image, and references to them."""
    from kafka import KafkaProducer

    settings = broker.model_copy(update={"topic": new_topic()})
    producer = KafkaProducer(bootstrap_servers=broker.bootstrap_servers)
    references = []
    for data in [*(data for _, _, data in digit_images(30)), HOSTILE]:
        image_id = hashlib.sha256(data).hexdigest()
        metadata = producer.send(settings.topic, data, key=image_id.encode()).get(timeout=300)
        references.append(ImageRef(settings.topic, metadata.partition, metadata.offset, image_id))
    producer.close()
    return settings, references


def test_image_in_kafka_becomes_a_thumbnail(published: tuple[Settings, list[ImageRef]]) -> None:
    settings, (*digits, hostile) = published
    found = Pictures(settings).of([*digits[::3], hostile])
    assert list(found) == digits[::3]
    for thumbnail in found.values():
        with Image.open(BytesIO(thumbnail)) as image:
            assert (image.format, image.size) == ("PNG", (224, 224))


def test_missing_or_different_message_is_omitted(
    published: tuple[Settings, list[ImageRef]],
) -> None:
    settings, (first, second, *_) = published
    gone = replace(first, offset=10_000)
    different = replace(first, image_id=second.image_id, offset=first.offset)
    no_such_topic = replace(second, topic=new_topic())
    assert Pictures(settings).of([gone, different]) == {}
    assert Pictures(settings).of([no_such_topic]) == {}


def test_unchanged_published_file_is_shown_without_a_broker(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    (_, _, data), *_ = digit_images(1)
    file = tmp_path / "digit.png"
    file.write_bytes(data)
    same = ImageRef("images", 0, 0, hashlib.sha256(data).hexdigest(), str(file))
    other = replace(same, image_id="0" * 64)
    assert list(Pictures(settings).of([same, other])) == [same]
