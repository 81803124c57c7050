"""The Delta tables of the service: their schemas, and idempotent appends.

The tables are not written by Spark's Delta writer, so a commit takes milliseconds instead of seconds. Every append
carries an application transaction (app id, version) in the same commit as its rows; an append whose version the table
has already seen is skipped.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from math import isfinite
from pathlib import Path
from time import time
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.compute as pc
from deltalake import CommitProperties, DeltaTable, Schema, Transaction
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError
from deltalake.schema import ArrayType as DeltaArray
from deltalake.schema import StructType as DeltaStruct
from deltalake.transaction import AddAction

from streaming.errors import ConfigurationError, ConflictError, DamagedError, ServiceError
from streaming.storage.files import DataFile, FileSink
from streaming.storage.store import check_key, is_uri, open_store
from streaming.storage.store_errors import STORE_ERROR, StoreAwayError
from streaming.storage.table_features import check_commit_error, check_no_deleted_rows
from streaming.storage.table_log import (
    CHECKPOINT_INTERVAL,
    COMMIT_TRIES,
    REWRITE,
    TableLog,
    boot_seconds,
    open_delta,
    storage_options,
    store_errors_in_one_line,
)

if TYPE_CHECKING:
    from pyspark.sql.types import StructType

TIMESTAMP = pa.timestamp("us", tz="UTC")
LINEAGE = [
    pa.field("model_version", pa.int32()),
    pa.field("bundle_sha256", pa.string()),
    pa.field("query_id", pa.string()),
    pa.field("batch_id", pa.int64()),
]
IDENTITY = [
    pa.field("image_id", pa.string()),
    pa.field("topic", pa.string()),
    pa.field("partition", pa.int32()),
    pa.field("offset", pa.int64()),
    pa.field("published_at", TIMESTAMP),
    pa.field("source", pa.string()),
    pa.field("label_true", pa.string()),
    pa.field("key", pa.binary()),  # of the message, not unique; long keys are truncated except in `quarantine`
    pa.field("timestamp_ms", pa.int64()),  # of the message; `published_at` is null if it is not a valid time
]
HEADER = pa.struct([pa.field("key", pa.string()), pa.field("value", pa.binary())])
ANSWER = [
    pa.field("label", pa.string()),
    pa.field("confidence", pa.float32()),
    pa.field("top_k", pa.list_(pa.struct([pa.field("label", pa.string()), pa.field("probability", pa.float32())]))),
    pa.field("scored_at", TIMESTAMP),
]

DAMAGED = pa.field("damaged", pa.bool_())  # missing or extra bytes or rows; null in rows of earlier releases
TRACEPARENT = pa.field("traceparent", pa.string())  # W3C trace context of the message
PREDICTIONS = pa.schema([*IDENTITY, *ANSWER, *LINEAGE, pa.field("date", pa.date32()), DAMAGED, TRACEPARENT])
QUARANTINE = pa.schema(
    [
        *IDENTITY,
        *LINEAGE,
        pa.field("quarantined_at", TIMESTAMP),
        pa.field("stage", pa.string()),
        pa.field("reason", pa.string()),
        pa.field("detail", pa.string()),
        pa.field("value", pa.binary()),
        pa.field("value_sha256", pa.string()),
        pa.field("replayed_at", TIMESTAMP),
        pa.field("headers", pa.list_(HEADER)),  # of the message; null in rows of earlier releases
    ]
)
FEATURES = pa.schema(
    [
        *IDENTITY,
        pa.field("backbone_sha256", pa.string()),
        pa.field("projection_sha256", pa.string()),  # null: the backbone's features, before any projection
        pa.field("features", pa.list_(pa.float32())),
        pa.field("augmentation", pa.int32()),  # null: the image itself; otherwise the number of an augmented copy
        pa.field("content_sha256", pa.string()),  # of the encoded image; null in rows of earlier releases
    ]
)
LABELS = pa.schema(
    [
        pa.field("image_id", pa.string()),
        pa.field("label", pa.string()),
        pa.field("labelled_at", TIMESTAMP),  # the latest label of an image counts
        pa.field("by", pa.string()),
    ]
)
SHADOW = pa.schema(
    [
        *IDENTITY,
        pa.field("champion_label", pa.string()),
        pa.field("champion_confidence", pa.float32()),
        pa.field("label", pa.string()),  # of the challenger, as are the two below
        pa.field("confidence", pa.float32()),
        pa.field("scored_at", TIMESTAMP),
        *LINEAGE,
    ]
)
# Predictions of another version for past images; those of the stream are in `predictions`, with the same identity.
RESCORED = pa.schema([*IDENTITY, *ANSWER, *LINEAGE])
# Rows that were erased on request: their position, without anything about the image.
ERASED = pa.schema(
    [
        pa.field("topic", pa.string()),
        pa.field("partition", pa.int32()),
        pa.field("offset", pa.int64()),
        *LINEAGE,
        pa.field("table", pa.string()),  # of the row: predictions or quarantine
        pa.field("erased_at", TIMESTAMP),
        pa.field("by", pa.string()),
    ]
)
OFFSET_RANGE = pa.struct(
    [
        pa.field("topic", pa.string()),
        pa.field("partition", pa.int32()),
        pa.field("start", pa.int64()),  # the first offset of the batch
        pa.field("end", pa.int64()),  # one past the last
    ]
)
COUNTED_RANGE = pa.struct(
    [
        *OFFSET_RANGE,
        # The number of messages. Null in rows of earlier releases, in which every offset had a message.
        pa.field("rows", pa.int64()),
        # The start of the log after the read; null if every offset had a message.
        pa.field("log_start", pa.int64()),
    ]
)
BATCHES = pa.schema(
    [
        *LINEAGE,
        pa.field("challenger_version", pa.int32()),
        pa.field("offsets", pa.list_(COUNTED_RANGE)),
        pa.field("left_out", pa.list_(OFFSET_RANGE)),  # lost before they were read, and skipped with the user's consent
        pa.field("topics", pa.map_(pa.string(), pa.string())),  # topic in the tables → id in Kafka; null in old rows
        pa.field("input_rows", pa.int64()),
        pa.field("predicted_rows", pa.int64()),
        pa.field("quarantined_rows", pa.int64()),
        pa.field("input_bytes", pa.int64()),
        pa.field("seconds", pa.map_(pa.string(), pa.float64())),
        pa.field("refused", pa.string()),  # rejected models that an alias points to, and the reasons
        pa.field("drift", pa.map_(pa.string(), pa.float64())),  # see models/drift.py and models/drift_alarm.py
        pa.field("started_at", TIMESTAMP),
        pa.field("committed_at", TIMESTAMP),
    ]
)

# Deletion vectors are disabled, so that readers without support for them can read the tables.
CONFIGURATION = {"delta.enableDeletionVectors": "false", "delta.checkpointInterval": str(CHECKPOINT_INTERVAL)}
SCHEMAS: dict[str, tuple[pa.Schema, str | None]] = {  # table → schema and partition column
    "predictions": (PREDICTIONS, "date"),
    "quarantine": (QUARANTINE, None),
    "features": (FEATURES, None),
    "labels": (LABELS, None),
    "shadow": (SHADOW, None),
    "rescored": (RESCORED, None),
    "batches": (BATCHES, None),
    "erased": (ERASED, None),
}
# The columns with statistics in the log; those of long values would be useless and enlarge the log.
STATISTICS = {
    "features": ["image_id", "topic", "partition", "offset", "label_true", "backbone_sha256"],
    "quarantine": ["image_id", "topic", "partition", "offset", "batch_id", "reason"],
}
NO_VALUE = "__HIVE_DEFAULT_PARTITION__"  # Delta's folder of rows whose partition column is null
CREATE_TRIES = 3
MAX_STATS_CHARS = 40  # longer strings have no minimum and maximum in statistics; a query's id has 36 characters


class Table:
    """One Delta table, with an open handle. It is created if it does not exist.

    Args:
        tables: the place of all tables, a path or a URI.
        name: one of `SCHEMAS`.

    Raises:
        TableFeatureError: the table uses a feature that is not supported.
        StoreAwayError: the bucket does not answer.
    """

    def __init__(self, tables: str | Path, name: str) -> None:
        schema, partition_by = SCHEMAS[name]
        configuration = dict(CONFIGURATION)
        if name in STATISTICS:
            configuration["delta.dataSkippingStatsColumns"] = ",".join(STATISTICS[name])
        self.name = name
        self.schema = schema
        self.tables = str(tables)
        self.place = f"{tables}/{name}"
        self.store = open_store(self.place)
        self._partition_by = partition_by
        now = boot_seconds()
        with store_errors_in_one_line(self.place):
            try:
                handle = open_delta(self.place)  # cheaper than `create`, which opens an existing table twice
            except TableNotFoundError:
                handle = self._create(configuration)
            self._log = TableLog(handle, self.place, now)  # which checks the features of the table
            self._add_missing_columns(handle)

    def _create(self, configuration: Mapping[str, str]) -> DeltaTable:
        for _ in range(CREATE_TRIES):
            try:
                return DeltaTable.create(
                    self.place,
                    self.schema,
                    mode="ignore",
                    partition_by=[self._partition_by] if self._partition_by else None,
                    configuration=configuration,
                    storage_options=storage_options(self.place),
                )
            except DeltaError as error:  # another process has created it, or the outcome of our put is unknown
                with suppress(TableNotFoundError):
                    return open_delta(self.place)
                if not is_uri(self.place) or STORE_ERROR.search(str(error)):
                    raise error from None
        raise StoreAwayError(
            f"{self.place} did not store the first entry of the table's log in {CREATE_TRIES} attempts"
        )

    def _add_missing_columns(self, handle: DeltaTable) -> None:
        """Add columns, and fields of columns, that a table of an earlier release lacks; they are null in old rows."""
        there = {field.name: field.type for field in handle.schema().fields}
        wanted = Schema.from_arrow(self.schema).fields
        missing = [field for field in wanted if field.name not in there or _lacks_fields(there[field.name], field.type)]
        if missing:
            handle.alter.add_columns(missing)
            self._log.refresh()

    def append(self, rows: pa.Table, app_id: str, version: int) -> bool:
        """Append rows in one commit, unless `app_id` has committed `version` before; return whether it was done.

        The files are written and committed here because `write_deltalake` takes 0.1 ms for each file of the table.
        """
        if not rows.num_rows or self._log.has(app_id, version):
            return False
        return self.append_files(self.write(rows), app_id, version)

    def write(self, rows: pa.Table) -> list[DataFile]:
        """Write rows into new files of the table's directory, one per partition, without committing them."""
        return [self._write(*part) for part in self._partitioned(rows)] if rows.num_rows else []

    def _partitioned(self, rows: pa.Table) -> Iterator[tuple[pa.Table, dict[str, str | None]]]:
        """The rows of each partition, without the partition column, and the column's value."""
        data, name = rows.select(self.schema.names).cast(self.schema), self._partition_by
        if name is None:
            yield data, {}
            return
        for value in data.column(name).unique():
            same = pc.equal(data.column(name), value) if value.is_valid else data.column(name).is_null()
            yield data.filter(same).drop_columns(name), {name: str(value) if value.is_valid else None}

    def _write(self, rows: pa.Table, partition: dict[str, str | None]) -> DataFile:
        """Write a new file of one partition."""
        folder = "".join(f"{name}={value or NO_VALUE}/" for name, value in partition.items())
        with FileSink(f"{self.place}/{folder}".rstrip("/"), rows.schema) as sink:
            sink.write(rows)
            file = sink.close()
        if file is None:
            raise ServiceError(f"no rows were written to {self.place}/{folder}")
        stats = json.dumps(statistics(rows, STATISTICS.get(self.name, rows.schema.names)))
        return replace(file, path=f"{folder}{file.path}", partition=partition, stats=stats)

    def append_files(self, files: Sequence[DataFile], app_id: str, version: int) -> bool:
        """Commit files that `write` or a worker has written, under the same condition as `append`."""
        if not files or self._log.has(app_id, version):
            return False
        if not is_uri(self.place):  # a worker on another machine may have written to its own disk
            gone = next((file.path for file in files if self.store.size(file.path) is None), None)
            if gone is not None:
                raise ConfigurationError(
                    f"{self.place}/{gone} was written for this commit but does not exist: workers on other machines "
                    "need a shared home, such as s3://BUCKET/PREFIX"
                )
        return self._log.commit([added(file) for file in files], app_id, version)

    def delete_beyond(self, topic: str, committed: Mapping[int, int]) -> int:
        """Delete the rows of a topic at or after the end of their partition, and return their number.

        Args:
            topic: by its name in the tables.
            committed: partition → end; all rows of other partitions are deleted.
        """
        name = topic.replace("'", "''")
        kept = " OR ".join(f"(partition = {one} AND offset < {end})" for one, end in sorted(committed.items()))
        predicate = f"topic = '{name}'" + (f" AND NOT ({kept})" if kept else "")
        for _ in range(COMMIT_TRIES):
            table = self._log.refresh()
            once = CommitProperties(app_transactions=[Transaction(REWRITE, self._log.next_rewrite())])
            # After a conflict, the rows are in other files, since files were replaced in the meantime.
            try:
                with store_errors_in_one_line(self.place):
                    return int(table.delete(predicate, commit_properties=once)["num_deleted_rows"])
            except CommitFailedError as error:
                check_commit_error(error, self.place)
        raise ConflictError(f"{self.place} is being rewritten repeatedly: stop `maintain` and `replay`, and try again")

    def files(self) -> list[str]:
        """The Parquet files of the table's newest version, as paths or URIs."""
        return data_files(self._log.refresh(), self.place)

    def bytes(self) -> int:
        """The total size of the files of the table's newest version."""
        sizes = pa.table(self._log.refresh().get_add_actions(flatten=True)).column("size_bytes")
        return int(pc.sum(sizes).as_py() or 0)

    def committed(self, app_id: str, version: int) -> bool:
        """Whether `app_id` has committed `version` or a later one.

        Commits of other processes within the last ten minutes may be missing; `append` detects them.
        """
        return self._log.has(app_id, version)

    def transaction(self, app_id: str) -> int | None:
        """The newest version that `app_id` has committed to this table, by any process."""
        return self._log.transaction(app_id)

    def recent_transaction(self, app_id: str) -> int | None:
        """As `transaction`, but for a table in a bucket the result may be ten minutes old, which saves a request."""
        return self._log.known_transaction(app_id) if is_uri(self.place) else self.transaction(app_id)


def _lacks_fields(there: Any, wanted: Any) -> bool:
    """Whether a column of lists of structs lacks fields."""
    if not (isinstance(there, DeltaArray) and isinstance(wanted, DeltaArray)):
        return False
    names = [
        {field.name for field in kind.element_type.fields} if isinstance(kind.element_type, DeltaStruct) else set()
        for kind in (there, wanted)
    ]
    return bool(names[1] - names[0])


def data_files(table: DeltaTable, place: str) -> list[str]:
    """The Parquet files of the version of a handle, as paths or URIs.

    Raises:
        ServiceError: the log names a file outside the table's directory.
        TableFeatureError: the files do not hold exactly the table's rows.
    """
    with store_errors_in_one_line(place):
        check_no_deleted_rows(table, place)
    files = [unquote(uri) for uri in table.file_uris()]  # they are percent-encoded
    for file in files:
        if not _is_inside(file, place):
            raise DamagedError(
                f"the log of {place} names {file!r}, which is outside the table: restore the table from a copy"
            )
    return files


def _is_inside(file: str, place: str) -> bool:
    if not is_uri(place):  # deltalake resolves symbolic links above the table, but not those in it
        folders = (os.path.abspath(place), os.path.realpath(place))  # noqa: PTH100
        return os.path.abspath(file).startswith(tuple(os.path.join(one, "") for one in folders))  # noqa: PTH100, PTH118
    try:
        check_key(file.removeprefix(f"{place}/"))
    except ServiceError:
        return False
    return file.startswith(f"{place}/")


def added(file: DataFile) -> AddAction:
    """The log action that adds a file; its statistics have at least the number of rows."""
    stats = file.stats or json.dumps({"numRecords": file.rows})
    return AddAction(file.path, file.bytes, dict(file.partition), int(time() * 1000), data_change=True, stats=stats)


def statistics(rows: pa.Table, names: Sequence[str]) -> dict[str, Any]:
    """The statistics of a file, by which readers skip files: number of rows, and minimum, maximum and nulls of columns.

    Long strings and nested columns have no minimum and maximum.

    Source: "Per-file Statistics" in Delta's protocol.
    """
    least: dict[str, Any] = {}
    greatest: dict[str, Any] = {}
    nulls: dict[str, int] = {}
    for name in names:
        column = rows.column(name)
        if pa.types.is_nested(column.type) or pa.types.is_binary(column.type):
            continue
        nulls[name] = column.null_count
        extremes = pc.min_max(column)
        low, high = (_as_statistic(extremes[end].as_py()) for end in ("min", "max"))
        if low is not None and high is not None:
            least[name], greatest[name] = low, high
    return {"numRecords": rows.num_rows, "minValues": least, "maxValues": greatest, "nullCount": nulls}


def merged_statistics(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Merge the statistics of parts with the same columns."""
    nulls = {name: sum(part["nullCount"][name] for part in parts) for name in parts[0]["nullCount"]}
    merged: dict[str, Any] = {"numRecords": sum(part["numRecords"] for part in parts), "nullCount": nulls}
    for key, extreme in (("minValues", min), ("maxValues", max)):
        # A column's extreme is unknown if any part has values but no extreme.
        known = {
            name: [part[key][name] for part in parts if name in part[key]]
            for name in nulls
            if all(name in part[key] or part["nullCount"][name] == part["numRecords"] for part in parts)
        }
        merged[key] = {name: extreme(values) for name, values in known.items() if values}
    return merged


def _as_statistic(value: Any) -> Any:
    """A value in the form of the log's JSON; None if it has none."""
    if isinstance(value, datetime):
        return value.isoformat(timespec="microseconds").replace("+00:00", "Z")
    if isinstance(value, str):
        return value if len(value) <= MAX_STATS_CHARS else None
    if isinstance(value, float):
        return value if isfinite(value) else None
    return value if isinstance(value, int) else None


def spark_schema(schema: pa.Schema) -> "StructType":
    """Convert an Arrow schema to Spark's."""
    from pyspark.sql.pandas.types import from_arrow_schema

    return from_arrow_schema(schema)
