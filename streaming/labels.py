"""What is known of the images: stored features joined with their labels."""

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F  # noqa: N812  as Spark's own documentation writes it

from streaming.errors import ServiceError
from streaming.tables import FEATURES, Table, spark_schema

BYTES_PER_PARTITION = 32 * 1024**2  # of compressed features


def labelled_features(spark: SparkSession, features: Table, backbone_sha256: str) -> DataFrame:
    """Every labelled image in the table `features` that this backbone made, once: image_id, label, features.

    Spark reads the Parquet files of the table's present version, which `deltalake` lists in milliseconds; its own
    Delta reader takes ten seconds to warm up. An image that came more than once keeps its latest row, so the latest
    label wins.

    Raises:
        ServiceError: the table is empty.
    """
    files = features.files()
    if not files:
        raise ServiceError(f"the table {features.directory} is empty: there is nothing to fit on")
    cores = spark.sparkContext.defaultParallelism
    partitions = max(cores, features.bytes() // BYTES_PER_PARTITION)
    spark.conf.set("spark.sql.shuffle.partitions", str(partitions))
    rows = spark.read.schema(spark_schema(FEATURES)).parquet(*files)
    rows = rows.where(
        (F.col("backbone_sha256") == backbone_sha256)
        & F.col("label_true").isNotNull()
        & F.col("projection_sha256").isNull()
    )
    latest = F.max_by(
        F.struct(F.col("label_true").alias("label"), "features"),
        F.coalesce("published_at", F.timestamp_seconds(F.lit(0))),
    )
    return rows.groupBy("image_id").agg(latest.alias("row")).select("image_id", "row.label", "row.features")
