"""Training-set membership: which images a version may have been fitted on, without Spark.

New bundles contain a Bloom filter of these images. Older bundles only contain the thresholds per class by which images
were held out; for them, each image in the tables counts as a member unless it was held out under all labels it ever
had.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from models.bloom_filter import BloomFilter, FittedOn
from models.bundle import FITTED_ON, Bundle
from models.errors import ModelError
from models.xxhash64 import HASH_BITS, spark_xxhash64
from streaming.images.groups import group_ids
from streaming.registry import Registry
from streaming.storage.home import Home
from streaming.storage.table_files import local_copies
from streaming.storage.table_log import open_delta
from streaming.storage.tables import FEATURES, LABELS, data_files

BATCH_ROWS = 10_000

# All names of the images, and all labels ever given to each name.
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


def fitted_on(bundle: Bundle, home: Home) -> FittedOn:
    """Return the images that a version may have been fitted on.

    Args:
        home: the home, whose tables are read only for a bundle of an older release.

    Raises:
        ModelError: the bundle's filter is invalid.
    """
    if FITTED_ON in bundle.files:
        return FittedOn.from_arrays(bundle.arrays(FITTED_ON))
    return FittedOn(_by_thresholds(bundle, home))


def backbone_fitted_on(registry: Registry, champion: Bundle, home: Home) -> BloomFilter | None:
    """Return the images on which the champion's backbone was trained; None if it was not trained in this home."""
    if champion.manifest.backbone.weights != "trained":
        return None
    recorded = fitted_on(champion, home).backbone
    if recorded is not None:
        return recorded
    for version in registry.versions():  # a backbone was trained for the first version that has it
        if registry.manifest(version).backbone_sha256 == champion.backbone_sha256:
            return fitted_on(registry.read(version), home).images
    return None


class TrainingMembership:
    """Tests whether versions may have been fitted on images; each version is read once.

    A version that is no longer in the registry, or is invalid, counts as fitted on all images.
    """

    def __init__(self, registry: Registry, home: Home) -> None:
        self._registry = registry
        self._home = home
        self._known: dict[str, tuple[FittedOn, str | None] | None] = {}

    def contains(self, bundle_sha256: str | None, images: pa.RecordBatch) -> NDArray[np.bool_]:
        """Return whether the version may have been fitted on each of N images, (N,) bool.

        Args:
            bundle_sha256: SHA-256 of the version's bundle; None for an unknown version.
            images: N rows with the columns image_id (of the content), known_as, source, key.
        """
        known = self._known_of(bundle_sha256)
        image_id, known_as = images.column("image_id"), images.column("known_as")
        if known is None:
            return np.ones(images.num_rows, bool)
        model, group_by = known
        names = [image_id, known_as]
        if group_by is not None:
            names.append(group_ids(group_by, image_id, known_as, images.column("source"), images.column("key")))
        return np.asarray(np.any([model.contains(as_bytes(one)) for one in names], axis=0), bool)

    def _known_of(self, bundle_sha256: str | None) -> tuple[FittedOn, str | None] | None:
        if bundle_sha256 is None:
            return None
        if bundle_sha256 not in self._known:
            self._known[bundle_sha256] = None
            version = self._registry.find(bundle_sha256)
            if version is not None:
                try:
                    bundle = self._registry.read(version)
                    group_by = bundle.manifest.training_data.group_by
                    self._known[bundle_sha256] = fitted_on(bundle, self._home), group_by
                except ModelError:
                    pass  # it stays unknown
        return self._known[bundle_sha256]


def salt_of(sha256: str) -> int:
    """Return a filter's salt from a hex digest."""
    return int(sha256[:16], 16)


def as_bytes(texts: pa.Array | pa.ChunkedArray) -> list[bytes]:
    """Encode strings as UTF-8; nulls become empty."""
    found: list[bytes] = texts.cast(pa.binary()).fill_null(b"").to_pylist()
    return found


def _by_thresholds(bundle: Bundle, home: Home) -> BloomFilter:
    """Return the images in the tables that the thresholds of an older bundle did not hold out."""
    data = bundle.manifest.training_data
    limits = {name: data.holdout.get(name, 0) for name in bundle.manifest.classes}  # without a threshold: fitted on
    with _claims(home) as (count, batches):
        found = BloomFilter.empty(count, salt_of(bundle.sha256))
        for batch in batches:
            hashes = spark_xxhash64(as_bytes(batch.column("image_id")), data.seed) >> np.uint64(64 - HASH_BITS)
            # A model was not fitted on images of classes that it does not have.
            labels = batch.column("label").to_pylist()
            limit = np.array([limits.get(label, 2**HASH_BITS) for label in labels], np.uint64)
            found.add(as_bytes(batch.column("content").filter(pa.array(hashes >= limit))))
    return found


@contextmanager
def _claims(home: Home) -> Iterator[tuple[int, pa.RecordBatchReader]]:
    """Yield the number of stored rows and a reader of the rows of `CLAIMS`."""
    from streaming.storage.sql import connect

    with TemporaryDirectory(prefix="imagestream-") as scratch, connect(spill_to=scratch) as connection:
        for name, table, schema in (("files", "features", FEATURES), ("given", "labels", LABELS)):
            files = _files(home, table)
            if files:
                connection.read_parquet(files, union_by_name=True).create_view(name)
            else:
                connection.from_arrow(schema.empty_table()).create(name)
        connection.from_arrow(FEATURES.empty_table()).create("columns")  # adds columns that no file has yet
        connection.sql(STORED).create_view("stored")
        ((count,),) = connection.execute("SELECT count(*) FROM stored").fetchall()
        yield count, connection.sql(CLAIMS).to_arrow_reader(BATCH_ROWS)


def _files(home: Home, table: str) -> list[str]:
    if not home.has_table(table):
        return []
    place = home.table(table)
    return local_copies(home, data_files(open_delta(place), place))
