"""What is known of the images: stored features joined with their labels, those that came with them and later ones."""

from pathlib import Path

from pyspark.sql import DataFrame, SparkSession, Window
from pyspark.sql import functions as F  # noqa: N812  as Spark's own documentation writes it

from streaming.errors import ServiceError
from streaming.images.images_frame import read_files
from streaming.tables import LABELS, Table

BYTES_PER_PARTITION = 32 * 1024**2  # of compressed features


def labelled_features(
    spark: SparkSession, features: Table, backbone_sha256: str, *, augmented: bool = False
) -> DataFrame:
    """Every labelled image in the table `features` that this backbone made, once: image_id, label, features.

    Spark reads the Parquet files of the table's present version, which `deltalake` lists in milliseconds; its own
    Delta reader takes ten seconds to warm up. An image that came more than once keeps its latest row. Its label is the
    latest in the table `labels` beside `features`, else the latest that came with it.

    Args:
        augmented: with the altered copies of each image as further rows, told apart by the column augmentation: their
            number, null for the image itself. A split puts them on the side of their image; they are never evaluated.

    Raises:
        ServiceError: the table is empty.
    """
    files = features.files()
    if not files:
        raise ServiceError(f"the table {features.directory} is empty: there is nothing to fit on")
    cores = spark.sparkContext.defaultParallelism
    partitions = max(cores, features.bytes() // BYTES_PER_PARTITION)
    spark.conf.set("spark.sql.shuffle.partitions", str(partitions))
    rows = read_files(spark, files)
    rows = rows.where((F.col("backbone_sha256") == backbone_sha256) & F.col("projection_sha256").isNull())
    if not augmented:
        rows = rows.where(F.col("augmentation").isNull())
    given_later = latest_labels(spark, features.directory.parent)
    if given_later is None:
        rows = rows.where(F.col("label_true").isNotNull())
    # The label breaks a tie, so that the same rows give the same answer.
    order = F.struct(
        F.col("label_true").isNotNull().alias("labelled"),
        F.coalesce("published_at", F.timestamp_seconds(F.lit(0))).alias("at"),
        F.col("label_true").alias("label"),
    )
    keys = ["image_id", "augmentation"] if augmented else ["image_id"]
    # All rows of an image in one partition: they are put together twice, and shuffled once.
    rows = rows.repartition("image_id").withColumn("order", order)
    rows = rows.groupBy(*keys).agg(F.max("order").alias("order"), F.max_by("features", "order").alias("features"))
    if augmented:
        rows = rows.withColumn("order", F.max("order").over(Window.partitionBy("image_id")))
    label = F.col("order.label")
    if given_later is not None:
        rows = rows.join(given_later, "image_id", "left")
        label = F.coalesce("given_label", label)
    rows = rows.withColumn("label", label).where(F.col("label").isNotNull())
    return rows.select("image_id", "label", "features", *keys[1:])


def latest_labels(spark: SparkSession, tables_dir: Path) -> DataFrame | None:
    """The latest of the labels that each image was given later: image_id, given_label; None where there are none."""
    if not (tables_dir / "labels" / "_delta_log").is_dir():
        return None
    files = Table(tables_dir, "labels").files()
    if not files:
        return None
    rows = read_files(spark, files, LABELS).where(F.col("label").isNotNull())
    latest = F.max_by("label", F.struct("labelled_at", "label"))
    return rows.groupBy("image_id").agg(latest.alias("given_label"))
