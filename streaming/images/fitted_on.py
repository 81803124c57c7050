"""Images that a version was possibly fitted on: recorded when it is made, and left out when versions are compared.

Bundles from before there was a record say by which thresholds of their classes images were held out. For them, each
image that the tables know counts as possibly fitted on unless it was held out under every label that it ever had.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce
from tempfile import TemporaryDirectory

import duckdb
import numpy as np
import pyarrow as pa
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F  # noqa: N812  as Spark's own documentation writes it

from models.backbone import FLATBUFFER_FILE
from models.bundle import FITTED_ON, MANIFEST, Bundle, parse_manifest
from models.fitted_on import BloomFilter, FittedOn
from models.registry import Registry
from models.xxhash64 import spark_xxhash64
from streaming.images.images_frame import arrow_function
from streaming.images.split import HASH_BITS
from streaming.tables import FEATURES, LABELS, Table

PARTS = 4  # filters that the driver holds at a time: 1.8 MB each for a million images
BATCH_ROWS = 10_000
MEMORY_LIMIT = "1GB"

# All names of the images, and all labels that each name ever had.
STORED = """
SELECT image_id, content_sha256, label_true FROM (FROM files UNION ALL BY NAME FROM columns) WHERE augmentation IS NULL
"""
CLAIMS = """
WITH names AS (SELECT image_id, coalesce(content_sha256, image_id) AS content FROM stored),
claims AS (
    SELECT image_id, label_true AS label FROM stored WHERE label_true IS NOT NULL
    UNION SELECT image_id, label FROM given WHERE label IS NOT NULL
)
SELECT content, image_id, label FROM names JOIN claims USING (image_id)
"""


def fitted_on(bundle: Bundle, features: Table) -> FittedOn:
    """What a version was possibly fitted on.

    Args:
        features: the service's table; only read for a bundle from before there was a record.

    Raises:
        ModelError: the bundle's record is not one.
    """
    if FITTED_ON in bundle.files:
        return FittedOn.from_arrays(bundle.arrays(FITTED_ON))
    return FittedOn(_by_thresholds(bundle, features))


def backbone_fitted_on(registry: Registry, champion: Bundle, features: Table) -> BloomFilter | None:
    """The images that the champion's backbone was trained on; None for a backbone that came trained from elsewhere."""
    if champion.manifest.backbone.weights != "trained":
        return None
    recorded = fitted_on(champion, features).backbone
    if recorded is not None:
        return recorded
    for version in registry.versions():  # the first version that has a backbone is the one that it was trained for
        manifest = parse_manifest((registry.path(version) / MANIFEST).read_bytes())
        if manifest.files[FLATBUFFER_FILE] == champion.backbone_sha256:
            return fitted_on(registry.read(version), features).images
    return None


def unseen_by(rows: DataFrame, model: FittedOn) -> DataFrame:
    """Those of the rows that a model was certainly not fitted on; columns as for `seen_by`."""
    return rows.where(~seen_by(model, rows))


def seen_by(model: FittedOn, rows: DataFrame) -> Column:
    """Whether a model was possibly fitted on each of the rows.

    Args:
        rows: image_id, and known_as and group_id where they have them: a model that was fitted on an image by one of
            these names, or on its group, has seen it.
    """

    def contains(ids: pa.Array) -> pa.Array:
        return pa.array(model.contains(as_bytes(ids)))

    asked = arrow_function(contains, "boolean")
    names = [name for name in ("image_id", "known_as", "group_id") if name in rows.columns]
    return reduce(Column.__or__, [asked(F.col(name)) for name in names])


def gather(rows: DataFrame, salt: int) -> BloomFilter:
    """The filter of rows (image_id, and group_id where images are grouped): of the images, and of their groups.

    Each partition fills a filter of its own, so that no id reaches the driver.
    """
    names = [name for name in ("image_id", "group_id") if name in rows.columns]
    capacity = len(names) * rows.count()

    def fill(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        part = BloomFilter.empty(capacity, salt)
        for batch in batches:
            for column in batch.columns:
                part.add(as_bytes(column))
        yield pa.RecordBatch.from_pydict({"bits": [part.bits.tobytes()]})

    whole = BloomFilter.empty(capacity, salt)
    parts = rows.select(*names).coalesce(PARTS).mapInArrow(fill, "bits binary").toArrow()
    for bits in parts.column("bits"):
        whole.merge(BloomFilter(np.frombuffer(bits.as_buffer(), np.uint8), salt))
    return whole


def salt_of(sha256: str) -> int:
    """A filter's salt from a hash in hex."""
    return int(sha256[:16], 16)


def as_bytes(texts: pa.Array | pa.ChunkedArray) -> list[bytes]:
    """Strings in UTF-8; nulls as the empty string."""
    found: list[bytes] = texts.cast(pa.binary()).fill_null(b"").to_pylist()
    return found


def _by_thresholds(bundle: Bundle, features: Table) -> BloomFilter:
    """The images that the thresholds of an older bundle did not hold out, of all that the tables know."""
    data = bundle.manifest.training_data
    limits = {name: data.holdout.get(name, 0) for name in bundle.manifest.classes}  # without a threshold: fitted on
    with _claims(features) as (count, batches):
        found = BloomFilter.empty(count, salt_of(bundle.sha256))
        for batch in batches:
            hashes = spark_xxhash64(as_bytes(batch.column("image_id")), data.seed) >> np.uint64(64 - HASH_BITS)
            # A model was not fitted on an image under a label that it does not know.
            labels = batch.column("label").to_pylist()
            limit = np.array([limits.get(label, 2**HASH_BITS) for label in labels], np.uint64)
            found.add(as_bytes(batch.column("content").filter(pa.array(hashes >= limit))))
    return found


@contextmanager
def _claims(features: Table) -> Iterator[tuple[int, pa.RecordBatchReader]]:
    """(number of stored rows, the rows of `CLAIMS`), read while the context lasts."""
    given = features.directory.parent / "labels"
    labels = Table(given.parent, "labels").files() if (given / "_delta_log").is_dir() else []
    with TemporaryDirectory(prefix="imagestream-") as scratch, duckdb.connect() as connection:
        connection.execute(f"SET memory_limit = '{MEMORY_LIMIT}'")
        connection.execute("SET temp_directory = $scratch", {"scratch": scratch})
        for name, files, schema in (("files", features.files(), FEATURES), ("given", labels, LABELS)):
            if files:
                connection.read_parquet(files, union_by_name=True).create_view(name)
            else:
                connection.from_arrow(schema.empty_table()).create(name)
        connection.from_arrow(FEATURES.empty_table()).create("columns")
        connection.sql(STORED).create_view("stored")
        ((count,),) = connection.execute("SELECT count(*) FROM stored").fetchall()
        yield count, connection.sql(CLAIMS).to_arrow_reader(BATCH_ROWS)
