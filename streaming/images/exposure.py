"""Which images a version was possibly fitted on, by its bundle or, for an older one, by the tables; without Spark.

Bundles from before there was a record say by which thresholds of their classes images were held out. For them, each
image that the tables know counts as possibly fitted on unless it was held out under every label that it ever had.
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


def fitted_on(bundle: Bundle, home: Home) -> FittedOn:
    """What a version was possibly fitted on.

    Args:
        home: its tables are only read for a bundle from before there was a record.

    Raises:
        ModelError: the bundle's record is not one.
    """
    if FITTED_ON in bundle.files:
        return FittedOn.from_arrays(bundle.arrays(FITTED_ON))
    return FittedOn(_by_thresholds(bundle, home))


def backbone_fitted_on(registry: Registry, champion: Bundle, home: Home) -> BloomFilter | None:
    """The images that the champion's backbone was trained on; None for a backbone that came trained from elsewhere."""
    if champion.manifest.backbone.weights != "trained":
        return None
    recorded = fitted_on(champion, home).backbone
    if recorded is not None:
        return recorded
    for version in registry.versions():  # the first version that has a backbone is the one that it was trained for
        if registry.manifest(version).backbone_sha256 == champion.backbone_sha256:
            return fitted_on(registry.read(version), home).images
    return None


class Exposure:
    """Answers whether versions were possibly fitted on images; each version is read once.

    Of a version that is not in the registry any more, or is refused, nobody knows what it was fitted on: on anything.
    """

    def __init__(self, registry: Registry, home: Home) -> None:
        self._registry = registry
        self._home = home
        self._known: dict[str, tuple[FittedOn, str | None] | None] = {}

    def seen(self, bundle_sha256: str | None, images: pa.RecordBatch) -> NDArray[np.bool_]:
        """Whether the version was possibly fitted on each of N images, (N,) bool.

        Args:
            images: image_id (of the content), known_as, source, key.
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
    """A filter's salt from a hash in hex."""
    return int(sha256[:16], 16)


def as_bytes(texts: pa.Array | pa.ChunkedArray) -> list[bytes]:
    """Strings in UTF-8; nulls as the empty string."""
    found: list[bytes] = texts.cast(pa.binary()).fill_null(b"").to_pylist()
    return found


def _by_thresholds(bundle: Bundle, home: Home) -> BloomFilter:
    """The images that the thresholds of an older bundle did not hold out, of all that the tables know."""
    data = bundle.manifest.training_data
    limits = {name: data.holdout.get(name, 0) for name in bundle.manifest.classes}  # without a threshold: fitted on
    with _claims(home) as (count, batches):
        found = BloomFilter.empty(count, salt_of(bundle.sha256))
        for batch in batches:
            hashes = spark_xxhash64(as_bytes(batch.column("image_id")), data.seed) >> np.uint64(64 - HASH_BITS)
            # A model was not fitted on an image under a label that it does not know.
            labels = batch.column("label").to_pylist()
            limit = np.array([limits.get(label, 2**HASH_BITS) for label in labels], np.uint64)
            found.add(as_bytes(batch.column("content").filter(pa.array(hashes >= limit))))
    return found


@contextmanager
def _claims(home: Home) -> Iterator[tuple[int, pa.RecordBatchReader]]:
    """(number of stored rows, the rows of `CLAIMS`), read while the context lasts."""
    import duckdb

    with TemporaryDirectory(prefix="imagestream-") as scratch, duckdb.connect() as connection:
        connection.execute(f"SET memory_limit = '{MEMORY_LIMIT}'")
        connection.execute("SET temp_directory = $scratch", {"scratch": scratch})
        for name, table, schema in (("files", "features", FEATURES), ("given", "labels", LABELS)):
            files = _files(home, table)
            if files:
                connection.read_parquet(files, union_by_name=True).create_view(name)
            else:
                connection.from_arrow(schema.empty_table()).create(name)
        connection.from_arrow(FEATURES.empty_table()).create("columns")  # those that no file has yet
        connection.sql(STORED).create_view("stored")
        ((count,),) = connection.execute("SELECT count(*) FROM stored").fetchall()
        yield count, connection.sql(CLAIMS).to_arrow_reader(BATCH_ROWS)


def _files(home: Home, table: str) -> list[str]:
    if not home.has_table(table):
        return []
    place = home.table(table)
    return local_copies(home, data_files(open_delta(place), place))
