"""A topic with a name of maximum length and 200 partitions."""

import uuid
from pathlib import Path

from deltalake import DeltaTable

from streaming.images.dataset import digit_images, write_images
from streaming.jobs.audit import audit
from streaming.pipeline.stream import TASKS_PER_CORE
from streaming.query import query
from streaming.settings import Settings
from tests.conftest import imagestream
from tests.producer.topics import create_topic

CORES = 2  # of the shared Spark session
IMAGES = 60


def test_many_partitions_give_few_files_per_batch(service: Settings, tmp_path: Path) -> None:
    topic = f"{uuid.uuid4().hex}-".ljust(249, "x")
    many = service.model_copy(update={"topic": topic})
    assert many.bootstrap_servers is not None
    create_topic(many.bootstrap_servers, topic, partitions=200)
    before = len(DeltaTable(many.place.table("features")).file_uris())  # of training
    imagestream(many, "publish", write_images(tmp_path / "images", digit_images(IMAGES, 300)))
    summary = imagestream(many, "stream", "--until-drained")
    assert (summary["predicted"], summary["batches"]) == (IMAGES, 1)
    partitions = query(many, 'SELECT count(DISTINCT "partition") AS n FROM predictions').column("n")[0].as_py()
    files = len(DeltaTable(many.place.table("features")).file_uris()) - before
    assert files <= TASKS_PER_CORE * CORES < partitions
    assert audit(many).clean
