"""A complete service for benchmarks: a real broker, a model, published photographs, and the stream as a process."""

import io
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from benchmarks.processes import end, run_json
from models.backbone import FLATBUFFER_FILE
from producer.message import build_message
from streaming.platform.broker import start_broker, stop_broker
from streaming.platform.kafka_node import free_port
from streaming.query import query
from streaming.registry import open_registry
from streaming.settings import Settings, read_settings

CORES = os.cpu_count() or 1
PIXELS = 300
PHOTOGRAPHS = 256  # distinct ones, published repeatedly
DIGITS = 1_000  # training images

# From the first micro-batch's commit, before which workers start and load the model, to the last one's.
STEADY_SQL = """
WITH mine AS (SELECT * FROM batches WHERE offsets[1].topic = $topic),
     first AS (SELECT min(committed_at) AS at FROM mine)
SELECT count(*) AS batches, sum(input_rows)::BIGINT AS rows,
       epoch(max(committed_at)) - epoch(any_value(first.at)) AS seconds
FROM mine, first WHERE committed_at > first.at
"""


def photographs(count: int = PHOTOGRAPHS) -> list[bytes]:
    """JPEGs of different parts of two photographs, of about 24 KB at 300×300."""
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(image) for image in load_sample_images().images]
    made = []
    for number in range(count):
        picture = pictures[number % len(pictures)]
        part = rng.uniform(0.5, 0.9)
        box_width, box_height = int(picture.width * part), int(picture.height * part)
        left, top = int(rng.integers(picture.width - box_width)), int(rng.integers(picture.height - box_height))
        image = picture.crop((left, top, left + box_width, top + box_height)).resize((PIXELS, PIXELS))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=86)
        made.append(buffer.getvalue())
    return made


@dataclass(frozen=True)
class Steady:
    """The result of a stream after its first micro-batch."""

    batches: int
    rows: int
    seconds: float
    summary: dict[str, Any]  # of the whole run, from `stream --json`

    @property
    def images_per_s(self) -> float:
        return self.rows / self.seconds


class Service:
    """A broker, and a home for each model that is measured."""

    def __init__(self, scratch: Path, settings: Settings) -> None:
        self.scratch = scratch
        self.settings = settings
        self.images = photographs()
        self.accuracy: dict[str, float] = {}  # of each home's champion, on held-out digits

    def write_images(self) -> Path:
        """The photographs as files, for peers."""
        folder = self.scratch / "images"
        folder.mkdir(exist_ok=True)
        for number, image in enumerate(self.images):
            (folder / f"{number:04}.jpg").write_bytes(image)
        return folder

    def publish(self, topic: str, count: int, per_transaction: int | None = None) -> None:
        """Publish `count` messages to a new topic.

        Args:
            per_transaction: messages of each transaction; None: without transactions.
        """
        from kafka import KafkaProducer

        own = {"transactional_id": topic} if per_transaction else {}
        producer = KafkaProducer(
            bootstrap_servers=self.settings.bootstrap_servers, batch_size=512 * 1024, linger_ms=10, **own
        )
        if per_transaction:
            producer.init_transactions()
        step = per_transaction or 1_000
        for start in range(0, count, step):
            if per_transaction:
                producer.begin_transaction()
            for number in range(start, min(start + step, count)):
                image = self.images[number % len(self.images)]
                message = build_message(image, f"photograph-{number}.jpg", image_id=f"{number:064x}")
                producer.send(topic, message.value, message.key, message.headers)
            producer.commit_transaction() if per_transaction else producer.flush()
        producer.close()

    def home(self, name: str, *options: object, uri: str | None = None) -> Settings:
        """Create a home with a champion trained on `DIGITS` digits with options of `imagestream train`.

        Args:
            uri: of a home in a bucket, whose work folder is then local.
        """
        work = self.scratch / name
        settings = self.settings.model_copy(update={"home": uri or str(work), "work": work if uri else None})
        if not open_registry(settings.home).versions():
            command = (sys.executable, "-m", "streaming", "--home", settings.home, "train", "--dataset", "digits")
            environment = self.environment("unused") | _environment(settings)
            trained = run_json(*command, "--limit", DIGITS, *options, environment=environment)
            self.accuracy[name] = trained["metrics"]["accuracy"]
        return settings

    def flatbuffer(self, settings: Settings) -> Path:
        """The champion's backbone, for peers."""
        folder = settings.work_dir / "champion"
        if not folder.exists():
            open_registry(settings.home).fetch(1, folder)
        return folder / FLATBUFFER_FILE

    def stream(
        self, settings: Settings, topic: str, *options: object, environment: Mapping[str, str] = MappingProxyType({})
    ) -> dict[str, Any]:
        """Run `imagestream stream` on a topic as a separate process, and return its summary."""
        return run_json(
            sys.executable, "-m", "streaming", "--home", settings.home, "stream", *options,
            environment=self.environment(topic) | _environment(settings) | dict(environment),
        )  # fmt: skip

    def drain(
        self,
        settings: Settings,
        topic: str,
        images_per_batch: int,
        *options: object,
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> Steady:
        """Score all messages of a topic, and return the steady part of the run."""
        options = ("--until-drained", "--images-per-batch", images_per_batch, *options)
        summary = self.stream(settings, topic, *options, environment=environment)
        return steady(settings, topic, summary)

    def images_per_s(self, settings: Settings, topic: str, images: int, per_batch: int, *options: object) -> float:
        """Publish images to a new topic, score them, and return the steady throughput."""
        self.publish(topic, images)
        return self.drain(settings, topic, per_batch, *options).images_per_s

    @contextmanager
    def streaming(self, settings: Settings, topic: str, *options: str) -> Iterator[None]:
        """Run `imagestream stream` on a topic in the background."""
        command = (sys.executable, "-m", "streaming", "--home", settings.home, "stream", *options)
        environment = os.environ | self.environment(topic) | _environment(settings)
        with (self.scratch / "stream.log").open("w") as log:
            stream = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            yield
        finally:
            end(stream)

    def environment(self, topic: str) -> dict[str, str]:
        """The environment in which commands of `imagestream` find this broker and the jars."""
        return {
            "IMAGESTREAM_TOPIC": topic,
            "IMAGESTREAM_BOOTSTRAP_SERVERS": str(self.settings.bootstrap_servers),
            "IMAGESTREAM_JARS": str(self.settings.jars),
            "IMAGESTREAM_BACKBONES": str(self.settings.backbones),
        }


def _environment(settings: Settings) -> dict[str, str]:
    return {"IMAGESTREAM_WORK": str(settings.work)} if settings.work else {}


def steady(settings: Settings, topic: str, summary: dict[str, Any]) -> Steady:
    """The rows of the table `batches` of a topic after the first micro-batch."""
    (row,) = query(settings, STEADY_SQL, parameters={"topic": topic}).to_pylist()
    if not row["rows"]:
        raise RuntimeError("expected at least two micro-batches, to measure after the first one; got one")
    return Steady(row["batches"], row["rows"], row["seconds"], summary)


@contextmanager
def a_service() -> Iterator[Service]:
    """A service in a temporary folder, whose broker runs within the context, with the jars of the checkout's home."""
    settings = read_settings()
    places = {"jars": settings.jars_dir.resolve(), "backbones": settings.backbones_dir.resolve()}
    with TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        settings = settings.model_copy(update={"home": scratch, **places})
        state, _ = start_broker(settings, free_port())
        try:
            yield Service(Path(scratch), settings.model_copy(update={"bootstrap_servers": state.address}))
        finally:
            stop_broker(settings)
