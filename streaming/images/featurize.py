"""Batch featurization: images in, rows of the table `features` out, on the workers and without the driver.

Each task commits the rows that it made, so that a run that was stopped loses no more than the tasks under way. The next
run leaves out what the table holds already: the same image from the same place, with the same label, by the same
backbone. Tasks are cut by cores, number and bytes of the images.
"""

import math
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import pyarrow.compute as pc
from pyspark import Accumulator
from pyspark.sql import SparkSession
from pyspark.sql import functions as F  # noqa: N812  as Spark's own documentation writes it

from models.augment import DEFAULT_AUGMENTATION, Augmentation
from models.backbone import ExportedBackbone
from models.bundle import BackboneEntry, Bundle
from models.decode import DEFAULT_LIMITS, Limits
from streaming.errors import reported
from streaming.images.dataset import Dataset, LabelledFile
from streaming.images.featurize_task import REPORT_DDL, FeaturizeTask, featurize_partition
from streaming.images.images_frame import count_duplicates, images_frame, known_images
from streaming.storage.tables import Table

IMAGES_PER_TASK = 512  # long enough that starting a task costs little, short enough that the cores end together
BYTES_PER_TASK = 128 * 1024**2
BAD_SHOWN = 100
POLL_S = 0.5


@dataclass(frozen=True)
class FeatureSource:
    """A backbone on disk.

    Attributes:
        file: what its engine runs.
        sha256: names the features.
    """

    entry: BackboneEntry
    file: Path
    sha256: str

    @classmethod
    def of(cls, exported: ExportedBackbone) -> Self:
        """An export, run by LiteRT."""
        return cls(BackboneEntry.of(exported), exported.flatbuffer, exported.sha256)

    @classmethod
    def of_bundle(cls, bundle: Bundle, folder: Path) -> Self:
        """That of a bundle whose files are in `folder`; a backbone by name runs on LiteRT, whatever answers with it."""
        entry = bundle.manifest.backbone
        if entry.network is None:
            entry = entry.model_copy(update={"engine": "litert"})
        return cls(entry, folder / entry.scored_file, bundle.backbone_sha256)


@dataclass(frozen=True)
class Featurized:
    """What became of the images.

    Attributes:
        rows: images whose features the table holds now.
        bad: path → why it is not in the table, of the first ones.
        n_bad: how many are not.
        reused: of `rows`, those that the table held before.
        copies: altered copies that were added.
        duplicates: images whose very bytes come earlier in the data set, too.
        conflicting: different images that the data set gives more than one label.
    """

    rows: int
    bad: dict[str, str]
    n_bad: int = 0
    reused: int = 0
    copies: int = 0
    duplicates: int = 0
    conflicting: int = 0

    def warnings(self) -> list[str]:
        """What to know of the images, a line each."""
        lines = []
        if self.duplicates:
            lines.append(f"{self.duplicates:,} images are duplicates: their bytes come more than once")
        if self.conflicting:
            lines.append(f"{self.conflicting:,} images have more than one label: the same bytes, labelled differently")
        return lines


def featurize(
    spark: SparkSession,
    images: Dataset | Sequence[LabelledFile],
    backbone: FeatureSource | ExportedBackbone,
    table: Table,
    max_bad_shown: int = BAD_SHOWN,
    *,
    augment: int = 0,
    augmentation: Augmentation = DEFAULT_AUGMENTATION,
    limits: Limits = DEFAULT_LIMITS,
    on_progress: Callable[[int], None] | None = None,
) -> Featurized:
    """Append the backbone's features of every image to `table`, but for those that it holds already.

    An image that does not decode is left out and reported.

    Args:
        augment: how many altered copies of each image to store, too. They bear the image's id, so that they are on its
            side of a split, and are made anew by each run that asks for them.
        limits: what is decoded, and what that may cost.
        on_progress: called now and then with the number of images done.
    """
    if isinstance(backbone, ExportedBackbone):
        backbone = FeatureSource.of(backbone)
    cores = spark.sparkContext.defaultParallelism
    spark.conf.set("spark.sql.shuffle.partitions", str(cores))
    frame = images_frame(spark, images, lambda n, size: task_count(n, size, cores))
    known = known_images(spark, table, backbone.sha256)
    work = frame if known is None else frame.join(F.broadcast(known), "source", "left")
    network = spark.sparkContext.broadcast(backbone.file.read_bytes())
    done = spark.sparkContext.accumulator(0)
    task = FeaturizeTask(
        uuid.uuid4().hex,
        datetime.now(UTC),
        table.tables,
        table.name,
        not isinstance(images, Dataset) or images.kind == "files",
        backbone.sha256,
        backbone.entry,
        augment,
        augmentation,
        limits,
    )

    def run(batches: Any) -> Any:
        return featurize_partition(batches, lambda: network.value, task, done)

    with _polled(done, on_progress):
        reports = work.mapInArrow(reported(run), REPORT_DDL).toArrow()
    network.unpersist()
    total = {name: pc.sum(reports.column(name)).as_py() or 0 for name in ("rows", "reused", "copies", "bad")}
    bad = {one["path"]: one["why"] for one in reports.to_pylist() if one["path"] is not None}
    duplicates, conflicting = count_duplicates(frame, table, backbone.sha256) if any(total.values()) else (0, 0)
    return Featurized(
        rows=total["rows"] + total["reused"],
        bad=dict(sorted(bad.items())[:max_bad_shown]),
        n_bad=total["bad"],
        reused=total["reused"],
        copies=total["copies"],
        duplicates=duplicates,
        conflicting=conflicting,
    )


def task_count(images: int, size: int, cores: int) -> int:
    """How many tasks to cut the images into: a whole number of rounds over the cores, so that they end together.

    Args:
        size: bytes of all images together.
    """
    rounds = max(math.ceil(images / (cores * IMAGES_PER_TASK)), math.ceil(size / (cores * BYTES_PER_TASK)))
    return max(1, min(images, cores * rounds))


@contextmanager
def _polled(done: "Accumulator[int]", tell: Callable[[int], None] | None) -> Iterator[None]:
    """Tell the accumulator's value now and then during the block, and at its end."""
    if tell is None:
        yield
        return
    ended = threading.Event()

    def poll() -> None:
        while not ended.wait(POLL_S):
            tell(done.value)

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    tell(done.value)
