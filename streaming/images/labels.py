"""Stored features joined with their labels: those in the messages, and those added later.

Images are identified by content: the same bytes under several names are one image with one label. The id is the SHA-256
of the bytes or, in rows of older releases without it, the name of the image.

The label of an image is the latest one added by `imagestream label` under any of its names; otherwise, the latest one
that was published with each name. An image whose names have different labels is contradictory and is left out.
"""

import pyarrow as pa
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F  # noqa: N812  as Spark's own documentation writes it

from streaming.errors import NotFoundError
from streaming.images.groups import group_ids
from streaming.images.images_frame import arrow_function, read_files
from streaming.storage.home import has_table
from streaming.storage.tables import LABELS, Table

BYTES_PER_PARTITION = 32 * 1024**2  # of compressed features


def labelled_features(
    spark: SparkSession, features: Table, backbone_sha256: str, *, augmented: bool = False, group_by: str | None = None
) -> DataFrame:
    """Return the features of every labelled image, once each.

    Spark reads the Parquet files of the table's current version, which `deltalake` lists in milliseconds; Spark's Delta
    reader takes ten seconds to warm up.

    Args:
        augmented: include augmented copies as further rows; the column `augmentation` is their number, null for the
            image itself. A split keeps them on the side of their image; they are never evaluated.
        group_by: grouping of images, see `streaming.images.groups`.

    Returns:
        Columns image_id, known_as, label, features and, if requested, group_id and augmentation. `known_as` is the
        latest name of the image: the `image_id` of the tables.

    Raises:
        ServiceError: the table is empty.
    """
    rows = _stored(spark, features, backbone_sha256)
    keys = ["image_id", "augmentation"] if augmented else ["image_id"]
    if not augmented:
        rows = rows.where(F.col("augmentation").isNull())
    # All rows of an image in one partition: the wide column is shuffled once.
    wide = (
        rows.repartition("image_id")
        .groupBy(*keys)
        .agg(F.max_by("features", F.struct("at", "known_as", "label_true")).alias("features"))
    )
    labels = _image_labels(spark, features, rows, group_by).where(F.col("label").isNotNull())
    group = [] if group_by is None else ["group_id"]
    return wide.join(labels, "image_id").select("image_id", "known_as", "label", "features", *group, *keys[1:])


def count_contradictory(spark: SparkSession, features: Table, backbone_sha256: str) -> int:
    """Return the number of images that `labelled_features` leaves out because of contradictory labels."""
    rows = _stored(spark, features, backbone_sha256)
    return _image_labels(spark, features, rows, None).where(F.col("contradictory")).count()


def image_labels(claims: DataFrame, given: DataFrame | None, group_by: str | None = None) -> DataFrame:
    """Return the label of each image, from the labels of all its names.

    Args:
        claims: columns image_id, known_as, label (null if unlabelled), at, source, key (bytes of the message's key).
        given: the result of `given_labels`.
        group_by: grouping of images, see `streaming.images.groups`.

    Returns:
        Columns image_id, known_as, source (one of them), label (null if unknown), contradictory and, with `group_by`,
        group_id: the first by name of the groups of its names.
    """
    if group_by is not None:
        claims = claims.withColumn("group_id", _group(group_by))
    group = [] if group_by is None else [F.min("group_id").alias("group_id")]
    lowest, highest = F.min("label").alias("low"), F.max("label").alias("high")
    source = F.min("source").alias("source")
    moments = claims.repartition("image_id").groupBy("image_id", "known_as", "at").agg(lowest, highest, source, *group)
    labelled_at = F.when(F.col("low").isNotNull(), F.col("at"))
    names = moments.groupBy("image_id", "known_as").agg(
        F.max("at").alias("at"), F.max_by(F.struct("low", "high"), labelled_at).alias("last"), source, *group
    )
    images = names.groupBy("image_id").agg(
        F.max_by("known_as", F.struct("at", "known_as")).alias("known_as"),
        F.min("last.low").alias("low"),
        F.max("last.high").alias("high"),
        source,
        *group,
    )
    contradictory, label = F.col("low") != F.col("high"), F.col("low")
    if given is not None:
        images = images.join(given, "image_id", "left")
        contradictory &= F.col("given_label").isNull()
        label = F.coalesce("given_label", label)
    return images.select(
        "image_id",
        "known_as",
        "source",
        F.when(~F.coalesce(contradictory, F.lit(False)), label).alias("label"),
        F.coalesce(contradictory, F.lit(False)).alias("contradictory"),
        *(["group_id"] if group else []),
    )


def given_labels(spark: SparkSession, features: Table) -> DataFrame | None:
    """Return the latest label added to each image under any of its names (image_id, given_label); None if there are
    none.

    Args:
        features: the table `features`, which maps names to images.
    """
    if not has_table(features.tables, "labels"):
        return None
    files = Table(features.tables, "labels").files()
    if not files:
        return None
    labels = read_files(spark, files, LABELS).where(F.col("label").isNotNull())
    latest = F.max(F.struct("labelled_at", "label")).alias("given")
    by_name = labels.groupBy(F.col("image_id").alias("known_as")).agg(latest)
    if stored := features.files():
        names = read_files(spark, stored).select(F.col("image_id").alias("known_as"), _content().alias("image_id"))
        by_name = by_name.join(names.distinct(), "known_as", "left")
    else:
        by_name = by_name.withColumn("image_id", F.lit(None).cast("string"))
    image = F.coalesce("image_id", "known_as").alias("image_id")
    return by_name.groupBy(image).agg(F.max("given").getField("label").alias("given_label"))


def _group(group_by: str) -> Column:
    def groups(image_id: pa.Array, known_as: pa.Array, source: pa.Array, key: pa.Array) -> pa.Array:
        return group_ids(group_by, image_id, known_as, source, key)

    return arrow_function(groups, "string")("image_id", "known_as", "source", "key")


def _content() -> Column:
    return F.coalesce("content_sha256", "image_id")


def _stored(spark: SparkSession, features: Table, backbone_sha256: str) -> DataFrame:
    """Return the rows of a backbone including augmented copies, with image_id, known_as and at."""
    files = features.files()
    if not files:
        raise NotFoundError(f"the table {features.place} is empty: there are no images to fit on")
    cores = spark.sparkContext.defaultParallelism
    partitions = max(cores, features.bytes() // BYTES_PER_PARTITION)
    spark.conf.set("spark.sql.shuffle.partitions", str(partitions))
    rows = read_files(spark, files)
    rows = rows.where((F.col("backbone_sha256") == backbone_sha256) & F.col("projection_sha256").isNull())
    at = F.coalesce("published_at", F.timestamp_seconds(F.lit(0)))
    return rows.select(
        _content().alias("image_id"),
        F.col("image_id").alias("known_as"),
        "label_true",
        "source",
        "key",
        at.alias("at"),
        "augmentation",
        "features",
    )


def _image_labels(spark: SparkSession, features: Table, rows: DataFrame, group_by: str | None) -> DataFrame:
    images = rows.where(F.col("augmentation").isNull())
    claims = images.select("image_id", "known_as", F.col("label_true").alias("label"), "at", "source", "key")
    return image_labels(claims, given_labels(spark, features), group_by)
