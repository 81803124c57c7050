"""A data set as a Spark data frame, and its rows in the table `features`.

Every image has a unique `source`: a file's path, or a table's path and the image's name in the table.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence

import pyarrow as pa
from pyspark.sql import Column, DataFrame, DataFrameReader, SparkSession
from pyspark.sql import functions as F  # noqa: N812  as Spark's own documentation writes it

from streaming.errors import reported
from streaming.images.dataset import Dataset
from streaming.images.image_folder import LabelledFile
from streaming.images.image_table import ImageTable
from streaming.storage.files import conformed, local_copy, read_batches
from streaming.storage.store import is_uri
from streaming.storage.tables import FEATURES, Table, spark_schema

Tasks = Callable[[int, int], int]


def images_frame(spark: SparkSession, images: Dataset | Sequence[LabelledFile], tasks: Tasks) -> DataFrame:
    """Return rows (source, label, content) in partitions of about the same number of images and bytes.

    Args:
        tasks: (number of images, their size in bytes) → number of partitions.

    Returns:
        The rows; `content` is the encoded image, or null if the worker has to read the file `source`.
    """
    if isinstance(images, Dataset) and images.table is not None:
        return _table_rows(spark, images, images.table, tasks(images.n_images, images.table.n_bytes))
    files = images.files if isinstance(images, Dataset) else images
    n_tasks = tasks(len(files), sum(file.bytes for file in files))
    # Deal out files by size, so that every task gets its share of large ones.
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
    """Return this backbone's rows without augmented copies, and `at`, their time; None if the table is empty."""
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
    """Turn a function of annotated Arrow arrays into one of columns, of DDL type `returns`, that runs in workers."""
    made: Callable[..., Column] = F.arrow_udf(function, returns)  # type: ignore[attr-defined]  # new in Spark 4.1
    return made


def read_files(spark: SparkSession, files: Sequence[str], schema: pa.Schema = FEATURES) -> DataFrame:
    """Return the rows of a table's Parquet files, paths or URIs; a column that a file does not have is null."""
    if files and is_uri(files[0]):
        return _fetched(spark, files, schema)
    return _exact_paths(spark).schema(spark_schema(schema)).parquet(*files)


def _exact_paths(spark: SparkSession) -> DataFrameReader:
    """Return a reader that takes paths literally, since a name may contain `[`, by an internal option of Spark."""
    return spark.read.option("__globPaths__", "false")


def _fetched(spark: SparkSession, files: Sequence[str], schema: pa.Schema) -> DataFrame:
    """Return the rows of files in a bucket; workers fetch the files, so Spark needs neither jars nor credentials."""

    def read(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            for file in batch.column("file").to_pylist():
                place, _, name = file.rpartition("/")
                with local_copy(place, name) as copy:
                    for rows in read_batches(copy):
                        yield conformed(rows, schema)

    tasks = min(len(files), 4 * spark.sparkContext.defaultParallelism)
    names = {"file": pa.array(files, pa.string()), "task": pa.array([n % tasks for n in range(len(files))], pa.int32())}
    rows = spark.createDataFrame(pa.table(names)).repartitionById(tasks, "task")
    return rows.select("file").mapInArrow(reported(read), spark_schema(schema))


def known_images(spark: SparkSession, table: Table, backbone_sha256: str) -> DataFrame | None:
    """Return the table's latest row of each source (source, known_id, known_label); None if the table is empty."""
    stored = stored_features(spark, table, backbone_sha256)
    if stored is None:
        return None
    latest = F.max_by(F.struct("image_id", "label_true"), F.struct("at", "image_id"))
    known = stored.where(F.col("source").isNotNull()).groupBy("source").agg(latest.alias("row"))
    return known.select("source", F.col("row.image_id").alias("known_id"), F.col("row.label_true").alias("known_label"))


def featurized_rows(frame: DataFrame, table: Table, backbone_sha256: str) -> DataFrame | None:
    """Return rows (source, image_id, label, features) of the images of a data set that the table contains.

    Args:
        frame: the result of `images_frame`.
        table: the table `features`.
    """
    spark = frame.sparkSession
    stored = stored_features(spark, table, backbone_sha256)
    if stored is None:
        return None
    stored = stored.where(F.col("source").isNotNull())
    wanted = frame.select("source", "label")
    # Find each source's latest row without the wide column of features.
    latest = stored.groupBy("source").agg(F.max("at").alias("at"))
    found = F.broadcast(wanted.join(latest, "source"))
    rows = stored.select("source", "at", "image_id", "features").join(found, ["source", "at"])
    return rows.select("source", "image_id", "label", "features")


def count_duplicates(frame: DataFrame, table: Table, backbone_sha256: str) -> tuple[int, int]:
    """Return the number of images whose content occurs earlier in the data set, and of images with several labels.

    Args:
        frame: the result of `images_frame`.
        table: the table `features`.
    """
    rows = featurized_rows(frame, table, backbone_sha256)
    if rows is None:
        return 0, 0
    images = rows.groupBy("image_id").agg(F.count("*").alias("n"), F.count_distinct("label").alias("labels"))
    counts = images.agg(F.sum(F.col("n") - 1), F.sum((F.col("labels") > 1).cast("int"))).collect()[0]
    return int(counts[0] or 0), int(counts[1] or 0)


def _table_rows(spark: SparkSession, images: Dataset, table: ImageTable, tasks: int) -> DataFrame:
    reader = _exact_paths(spark).option("basePath", str(table.root))
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
    """Return the class name of a label; null if it is not a label."""
    if class_of:
        # A constant map is created once, not per row.
        names = F.from_json(F.lit(json.dumps(dict(class_of))), "map<string,string>")
        text = F.coalesce(names[text], text)
    return F.when(text != "", text)
