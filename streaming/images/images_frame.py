"""A data set as Spark rows, and what the table `features` holds of it already.

Every image has a `source` that tells it from the others: a file's path, or a table's path with the image's name in it.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence

import pyarrow as pa
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F  # noqa: N812  as Spark's own documentation writes it

from streaming.errors import reported
from streaming.images.dataset import Dataset, LabelledFile
from streaming.images.image_table import ImageTable
from streaming.storage.files import at_hand, conformed, read_batches
from streaming.storage.store import is_uri
from streaming.storage.tables import FEATURES, Table, spark_schema

Tasks = Callable[[int, int], int]


def images_frame(spark: SparkSession, images: Dataset | Sequence[LabelledFile], tasks: Tasks) -> DataFrame:
    """Rows (source, label, content), divided among tasks of about the same number of images and bytes.

    Args:
        tasks: how many for a number of images and their bytes.

    Returns:
        content: the encoded image; null where the worker reads the file that `source` names.
    """
    if isinstance(images, Dataset) and images.table is not None:
        return _table_rows(spark, images, images.table, tasks(images.n_images, images.table.n_bytes))
    files = images.files if isinstance(images, Dataset) else images
    n_tasks = tasks(len(files), sum(file.bytes for file in files))
    # Dealt out by size, as cards are: every task gets as many large ones as the others.
    dealt = sorted(files, key=lambda file: -file.bytes)
    names = pa.table(
        {
            "source": pa.array([file.path for file in dealt], pa.string()),
            "label": pa.array([file.label for file in dealt], pa.string()),
            "task": pa.array([number % n_tasks for number in range(len(dealt))], pa.int32()),
        }
    )
    rows = spark.createDataFrame(names).repartitionById(n_tasks, "task")
    return rows.select("source", "label", F.lit(None).cast("binary").alias("content"))


def stored_features(spark: SparkSession, table: Table, backbone_sha256: str) -> DataFrame | None:
    """The rows of the table that are this backbone's features of an image itself; None where the table is empty.

    The columns are the table's, and `at`, when the row was made.
    """
    files = table.files()
    if not files:
        return None
    rows = read_files(spark, files)
    rows = rows.where(
        (F.col("backbone_sha256") == backbone_sha256)
        & F.col("projection_sha256").isNull()
        & F.col("augmentation").isNull()
    )
    return rows.withColumn("at", F.coalesce("published_at", F.timestamp_seconds(F.lit(0))))


def arrow_function(function: Callable[..., pa.Array], returns: str) -> Callable[..., Column]:
    """A function of Arrow arrays, with its types annotated, as one of columns; run in Spark's Python workers.

    Args:
        returns: the type of the new column, as in DDL.
    """
    made: Callable[..., Column] = F.arrow_udf(function, returns)  # type: ignore[attr-defined]  # new in Spark 4.1
    return made


def read_files(spark: SparkSession, files: Sequence[str], schema: pa.Schema = FEATURES) -> DataFrame:
    """The rows of a table's Parquet files; a column that a file does not have yet is null."""
    if files and is_uri(files[0]):
        return _fetched(spark, files, schema)
    reader = spark.read.schema(spark_schema(schema)).option("__globPaths__", "false")  # a name may hold a [
    return reader.parquet(*files)


def _fetched(spark: SparkSession, files: Sequence[str], schema: pa.Schema) -> DataFrame:
    """The rows of files in a bucket: workers fetch them, so that Spark needs no jars and no credentials for it."""

    def read(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            for file in batch.column("file").to_pylist():
                place, _, name = file.rpartition("/")
                with at_hand(place, name) as copy:
                    for rows in read_batches(copy):
                        yield conformed(rows, schema)

    tasks = min(len(files), 4 * spark.sparkContext.defaultParallelism)
    names = {"file": pa.array(files, pa.string()), "task": pa.array([n % tasks for n in range(len(files))], pa.int32())}
    rows = spark.createDataFrame(pa.table(names)).repartitionById(tasks, "task")
    return rows.select("file").mapInArrow(reported(read), spark_schema(schema))


def known_images(spark: SparkSession, table: Table, backbone_sha256: str) -> DataFrame | None:
    """Rows (source, known_id, known_label) of what the table holds, each source's latest; None where it is empty."""
    stored = stored_features(spark, table, backbone_sha256)
    if stored is None:
        return None
    latest = F.max_by(F.struct("image_id", "label_true"), F.struct("at", "image_id"))
    known = stored.where(F.col("source").isNotNull()).groupBy("source").agg(latest.alias("row"))
    return known.select("source", F.col("row.image_id").alias("known_id"), F.col("row.label_true").alias("known_label"))


def featurized_rows(frame: DataFrame, table: Table, backbone_sha256: str) -> DataFrame | None:
    """Rows (source, image_id, label, features) of the images of a data set, as far as the table holds them.

    Args:
        frame: what `images_frame` gave.
    """
    spark = frame.sparkSession
    stored = stored_features(spark, table, backbone_sha256)
    if stored is None:
        return None
    stored = stored.where(F.col("source").isNotNull())
    wanted = frame.select("source", "label")
    # Which row is each source's latest is found without the features, which are wide.
    latest = stored.groupBy("source").agg(F.max("at").alias("at"))
    found = F.broadcast(wanted.join(latest, "source"))
    rows = stored.select("source", "at", "image_id", "features").join(found, ["source", "at"])
    return rows.select("source", "image_id", "label", "features")


def count_duplicates(frame: DataFrame, table: Table, backbone_sha256: str) -> tuple[int, int]:
    """(images whose bytes come earlier in the data set, images with more than one label)."""
    rows = featurized_rows(frame, table, backbone_sha256)
    if rows is None:
        return 0, 0
    images = rows.groupBy("image_id").agg(F.count("*").alias("n"), F.count_distinct("label").alias("labels"))
    counts = images.agg(F.sum(F.col("n") - 1), F.sum((F.col("labels") > 1).cast("int"))).collect()[0]
    return int(counts[0] or 0), int(counts[1] or 0)


def _table_rows(spark: SparkSession, images: Dataset, table: ImageTable, tasks: int) -> DataFrame:
    reader = spark.read.option("__globPaths__", "false").option("basePath", str(table.root))
    spark.conf.set("spark.sql.sources.partitionColumnTypeInference.enabled", "false")  # a label 01 is not 1
    rows = reader.parquet(*table.files)
    label = _label(rows[table.label].cast("string"), table.class_of) if table.label else F.lit(None).cast("string")
    column, _, inner = table.image.partition(".")
    content = rows[column][inner] if inner else rows[column]
    if table.name:
        name = rows[table.name].cast("string")
    else:
        file = F.substring_index("_metadata.file_path", "/", -1 - len(table.partitions))
        name = F.concat_ws("#", file, F.col("_metadata.row_index").cast("string"))
    source = F.concat_ws("#", F.lit(str(images.source)), name)
    found = rows.select(source.alias("source"), label.alias("label"), content.alias("content"))
    if not images.keep_unlabelled:
        found = found.where(F.col("label").isNotNull())
    return found.repartition(tasks)


def _label(text: Column, class_of: Mapping[str, str]) -> Column:
    """The class's name, which most labels are already; null where there is none."""
    if class_of:
        # A map that is the same for all rows is made once.
        names = F.from_json(F.lit(json.dumps(dict(class_of))), "map<string,string>")
        text = F.coalesce(names[text], text)
    return F.when(text != "", text)
