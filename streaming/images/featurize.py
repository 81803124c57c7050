"""Batch featurization on the workers: images to rows of the table `features`.

Each task commits its own rows, so an interrupted run loses only the running tasks. The next run skips images that the
table already contains with the same source, content, label and backbone. Tasks are sized by the number of cores and the
number and size of the images.
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
from streaming.images.dataset import Dataset
from streaming.images.featurize_task import REPORT_DDL, FeaturizeTask, featurize_partition
from streaming.images.image_folder import LabelledFile
from streaming.images.images_frame import count_duplicates, images_frame, known_images
from streaming.storage.tables import Table
from streaming.wording import counted

IMAGES_PER_TASK = 512  # large enough to amortise the start of a task, small enough to balance the cores
BYTES_PER_TASK = 128 * 1024**2
BAD_SHOWN = 100
POLL_S = 0.5


@dataclass(frozen=True)
class FeatureSource:
    """A backbone on disk.

    Attributes:
        entry: its entry in a manifest.
        sha256: SHA-256 of the backbone, which identifies its features.
    """

    entry: BackboneEntry
    file: Path
    sha256: str

    @classmethod
    def of(cls, exported: ExportedBackbone) -> Self:
        """Return the source of an exported backbone, run by LiteRT."""
        return cls(BackboneEntry.of(exported), exported.flatbuffer, exported.sha256)

    @classmethod
    def of_bundle(cls, bundle: Bundle, folder: Path) -> Self:
        """Return the backbone of a bundle whose files are in `folder`; a named backbone always runs on LiteRT."""
        entry = bundle.manifest.backbone
        if entry.network is None:
            entry = entry.model_copy(update={"engine": "litert"})
        return cls(entry, folder / entry.scored_file, bundle.backbone_sha256)


@dataclass(frozen=True)
class Featurized:
    """The result of a featurization.

    Attributes:
        rows: number of images whose features are in the table.
        bad: path → reason, for the first images that could not be featurized.
        n_bad: number of images that could not be featurized.
        reused: number of `rows` that were already in the table.
        copies: number of augmented copies added.
        duplicates: number of images whose content occurs earlier in the data set.
        conflicting: number of distinct images with more than one label.
    """

    rows: int
    bad: dict[str, str]
    n_bad: int = 0
    reused: int = 0
    copies: int = 0
    duplicates: int = 0
    conflicting: int = 0

    def warnings(self) -> list[str]:
        """Return warnings about the images, one line each."""
        lines = []
        if self.duplicates:
            lines.append(f"{counted(self.duplicates, 'image')} identical to others, byte for byte")
        if self.conflicting:
            lines.append(
                f"{counted(self.conflicting, 'image')} with more than one label: "
                "the same bytes are labelled differently"
            )
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
    find_duplicates: bool = True,
    on_progress: Callable[[int], None] | None = None,
) -> Featurized:
    """Append the backbone's features of all images to `table`, except those that it already contains.

    Images that cannot be decoded are skipped and reported.

    Args:
        table: the table `features`.
        max_bad_shown: maximum number of bad images reported by name.
        augment: number of augmented copies to store per image. They have the image's id, so a split keeps them on its
            side; they are computed by every run that requests them.
        find_duplicates: whether to read the stored rows again to count `duplicates` and `conflicting`, 0 otherwise.
        on_progress: called periodically with the number of images done.
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
    duplicates = conflicting = 0
    if find_duplicates and any(total.values()):
        duplicates, conflicting = count_duplicates(frame, table, backbone.sha256)
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
    """Return the number of tasks for `size` bytes of images: a multiple of the cores, so that they finish together."""
    rounds = max(math.ceil(images / (cores * IMAGES_PER_TASK)), math.ceil(size / (cores * BYTES_PER_TASK)))
    return max(1, min(images, cores * rounds))


@contextmanager
def _polled(done: "Accumulator[int]", report: Callable[[int], None] | None) -> Iterator[None]:
    """Report the accumulator's value periodically during the block, and at its end."""
    if report is None:
        yield
        return
    ended = threading.Event()

    def poll() -> None:
        while not ended.wait(POLL_S):
            report(done.value)

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    report(done.value)
