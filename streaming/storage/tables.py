"""The Delta tables of the service: their schemas, and appends that happen once however often they are tried.

The stream does not write through Spark's Delta writer: a commit costs milliseconds instead of seconds. Every append
carries an application transaction (app id, version) in the same commit as its rows; an append whose version the table
has already seen is left out.
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
from streaming.storage.store_errors import OF_A_STORE, StoreAwayError
from streaming.storage.table_features import check_commit_error, check_features, check_whole_files
from streaming.storage.table_log import (
    CHECKPOINT_INTERVAL,
    COMMIT_TRIES,
    REWRITE,
    TableLog,
    answers,
    boot_seconds,
    open_delta,
    storage_options,
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
    pa.field("key", pa.binary()),  # the message's, which several may share; a long one is cut but in `quarantine`
    pa.field("timestamp_ms", pa.int64()),  # the message's as it came; `published_at` is null where it is not a time
]
HEADER = pa.struct([pa.field("key", pa.string()), pa.field("value", pa.binary())])
ANSWER = [
    pa.field("label", pa.string()),
    pa.field("confidence", pa.float32()),
    pa.field("top_k", pa.list_(pa.struct([pa.field("label", pa.string()), pa.field("probability", pa.float32())]))),
    pa.field("scored_at", TIMESTAMP),
]

DAMAGED = pa.field("damaged", pa.bool_())  # bytes or rows are missing, or too many; null in rows from before
TRACEPARENT = pa.field("traceparent", pa.string())  # the W3C trace context that came with the image
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
        pa.field("headers", pa.list_(HEADER)),  # as they came; null also in rows from before they were kept
    ]
)
FEATURES = pa.schema(
    [
        *IDENTITY,
        pa.field("backbone_sha256", pa.string()),
        pa.field("projection_sha256", pa.string()),  # null: the backbone's features, before any projection
        pa.field("features", pa.list_(pa.float32())),
        pa.field("augmentation", pa.int32()),  # null: the image itself; else the number of its altered copy
        pa.field("content_sha256", pa.string()),  # of the encoded image; null in rows from before it was stored
    ]
)
LABELS = pa.schema(
    [
        pa.field("image_id", pa.string()),
        pa.field("label", pa.string()),
        pa.field("labelled_at", TIMESTAMP),  # of one image the latest wins
        pa.field("by", pa.string()),
    ]
)
SHADOW = pa.schema(
    [
        *IDENTITY,
        pa.field("champion_label", pa.string()),
        pa.field("champion_confidence", pa.float32()),
        pa.field("label", pa.string()),  # the challenger's, as are the two below
        pa.field("confidence", pa.float32()),
        pa.field("scored_at", TIMESTAMP),
        *LINEAGE,
    ]
)
# What another version answers to history: the stream's answers are in `predictions`, by the same identity.
RESCORED = pa.schema([*IDENTITY, *ANSWER, *LINEAGE])
# Rows that were erased on request: where they were, and nothing of the image itself.
ERASED = pa.schema(
    [
        pa.field("topic", pa.string()),
        pa.field("partition", pa.int32()),
        pa.field("offset", pa.int64()),
        *LINEAGE,
        pa.field("table", pa.string()),  # that held the row: predictions or quarantine
        pa.field("erased_at", TIMESTAMP),
        pa.field("by", pa.string()),
    ]
)
OFFSET_RANGE = pa.struct(
    [
        pa.field("topic", pa.string()),
        pa.field("partition", pa.int32()),
        pa.field("start", pa.int64()),  # the first offset of the batch
        pa.field("end", pa.int64()),  # one past its last
    ]
)
COUNTED_RANGE = pa.struct(
    [
        *OFFSET_RANGE,
        # Offsets that held a message. Null in rows from before holes were counted: each offset held one.
        pa.field("rows", pa.int64()),
        # Where the log began after the read. Null where each offset held a message: it was not asked then.
        pa.field("log_start", pa.int64()),
    ]
)
BATCHES = pa.schema(
    [
        *LINEAGE,
        pa.field("challenger_version", pa.int32()),
        pa.field("offsets", pa.list_(COUNTED_RANGE)),
        pa.field("left_out", pa.list_(OFFSET_RANGE)),  # lost before these were read, and accepted as lost
        pa.field("topics", pa.map_(pa.string(), pa.string())),  # name in the tables → id in Kafka; null in old rows
        pa.field("input_rows", pa.int64()),
        pa.field("predicted_rows", pa.int64()),
        pa.field("quarantined_rows", pa.int64()),
        pa.field("input_bytes", pa.int64()),
        pa.field("seconds", pa.map_(pa.string(), pa.float64())),
        pa.field("refused", pa.string()),  # models that an alias points to and the stream does not take, and why
        pa.field(
            "drift", pa.map_(pa.string(), pa.float64())
        ),  # from held-out images; see models/drift.py, drift_alarm.py
        pa.field("started_at", TIMESTAMP),
        pa.field("committed_at", TIMESTAMP),
    ]
)

# Deletion vectors stay off, so that readers without them can read the tables.
CONFIGURATION = {"delta.enableDeletionVectors": "false", "delta.checkpointInterval": str(CHECKPOINT_INTERVAL)}
SCHEMAS: dict[str, tuple[pa.Schema, str | None]] = {  # and by what they are partitioned
    "predictions": (PREDICTIONS, "date"),
    "quarantine": (QUARANTINE, None),
    "features": (FEATURES, None),
    "labels": (LABELS, None),
    "shadow": (SHADOW, None),
    "rescored": (RESCORED, None),
    "batches": (BATCHES, None),
    "erased": (ERASED, None),
}
# Statistics of long values help no reader and make the log grow.
STATISTICS = {
    "features": ["image_id", "topic", "partition", "offset", "label_true", "backbone_sha256"],
    "quarantine": ["image_id", "topic", "partition", "offset", "batch_id", "reason"],
}
NO_VALUE = "__HIVE_DEFAULT_PARTITION__"  # the folder of rows whose partition column is null, for all readers of Delta
CREATE_TRIES = 3
MAX_TOLD = 40  # letters of a string in statistics: a query's id has 36


class Table:
    """One Delta table, made if it is not there, with its handle kept open."""

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
        with answers(self.place):
            try:
                handle = open_delta(self.place)  # which `create` would do twice
            except TableNotFoundError:
                handle = self._create(configuration)
            check_features(handle, self.place)
            self._add_missing_columns(handle)
        self._log = TableLog(handle, self.place, now)

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
            except DeltaError as error:  # another process created it just now, or the outcome of our put is not known
                with suppress(TableNotFoundError):
                    return open_delta(self.place)
                if not is_uri(self.place) or OF_A_STORE.search(str(error)):
                    raise error from None
        raise StoreAwayError(
            f"{self.place} did not store the first entry of the table's log in {CREATE_TRIES} attempts"
        )

    def _add_missing_columns(self, handle: DeltaTable) -> None:
        """Give a table of an earlier release the columns, and fields of columns, that it lacks: null in old rows."""
        there = {field.name: field.type for field in handle.schema().fields}
        wanted = Schema.from_arrow(self.schema).fields
        missing = [field for field in wanted if field.name not in there or _lacks(there[field.name], field.type)]
        if missing:
            handle.alter.add_columns(missing)

    def append(self, rows: pa.Table, app_id: str, version: int) -> bool:
        """Append rows in one commit, unless `app_id` has already committed `version`; True if it did append.

        The file is written here and committed by its name: what `write_deltalake` spends on an append grows with the
        files of the table, 0.1 ms for each.
        """
        if not rows.num_rows or self._log.has(app_id, version):
            return False
        return self.append_files(self.write(rows), app_id, version)

    def write(self, rows: pa.Table) -> list[DataFile]:
        """Write rows into new files of the table's directory, one per partition, that no commit names yet."""
        return [self._write(*part) for part in self._partitioned(rows)] if rows.num_rows else []

    def _partitioned(self, rows: pa.Table) -> Iterator[tuple[pa.Table, dict[str, str | None]]]:
        """The rows of each partition without the column that its folder's name tells, and that column's value."""
        data, name = rows.select(self.schema.names).cast(self.schema), self._partition_by
        if name is None:
            yield data, {}
            return
        for value in data.column(name).unique():
            same = pc.equal(data.column(name), value) if value.is_valid else data.column(name).is_null()
            yield data.filter(same).drop_columns(name), {name: str(value) if value.is_valid else None}

    def _write(self, rows: pa.Table, partition: dict[str, str | None]) -> DataFile:
        """A new file of one partition."""
        folder = "".join(f"{name}={value or NO_VALUE}/" for name, value in partition.items())
        with FileSink(f"{self.place}/{folder}".rstrip("/"), rows.schema) as sink:
            sink.write(rows)
            file = sink.close()
        if file is None:
            raise ServiceError(f"no rows were written to {self.place}/{folder}")
        stats = json.dumps(statistics(rows, STATISTICS.get(self.name, rows.schema.names)))
        return replace(file, path=f"{folder}{file.path}", partition=partition, stats=stats)

    def append_files(self, files: Sequence[DataFile], app_id: str, version: int) -> bool:
        """Make files part of the table, in one commit, under the same condition as `append`."""
        if not files or self._log.has(app_id, version):
            return False
        if not is_uri(self.place):  # a worker on another machine may have written to a disk that is not shared
            gone = next((file.path for file in files if self.store.size(file.path) is None), None)
            if gone is not None:
                raise ConfigurationError(
                    f"{self.place}/{gone} was written for this commit and is gone: workers on other machines need a "
                    "home that they share, such as s3://BUCKET/PREFIX"
                )
        return self._log.commit([added(file) for file in files], app_id, version)

    def delete_beyond(self, topic: str, committed: Mapping[int, int]) -> int:
        """Delete the rows of a topic at or after the committed end of their partition; returns how many."""
        name = topic.replace("'", "''")
        kept = " OR ".join(f"(partition = {one} AND offset < {end})" for one, end in sorted(committed.items()))
        predicate = f"topic = '{name}'" + (f" AND NOT ({kept})" if kept else "")
        for _ in range(COMMIT_TRIES):
            table = self._log.refresh()
            once = CommitProperties(app_transactions=[Transaction(REWRITE, self._log.next_rewrite())])
            # A conflict means that files were replaced meanwhile: those there are now have the rows.
            try:
                with answers(self.place):
                    return int(table.delete(predicate, commit_properties=once)["num_deleted_rows"])
            except CommitFailedError as error:
                check_commit_error(error, self.place)
        raise ConflictError(f"{self.place} is rewritten all the time: stop `maintain` and `replay`, and try again")

    def files(self) -> list[str]:
        """The Parquet files of the table's present version, as paths or URIs."""
        return data_files(self._log.refresh(), self.place)

    def bytes(self) -> int:
        """The size of those files."""
        sizes = pa.table(self._log.refresh().get_add_actions(flatten=True)).column("size_bytes")
        return int(pc.sum(sizes).as_py() or 0)

    def committed(self, app_id: str, version: int) -> bool:
        """Whether `app_id` has committed `version` or a later one to this table, by this process or ten minutes ago.

        What another one has committed since then is noticed by the append.
        """
        return self._log.has(app_id, version)

    def seen(self, app_id: str) -> int | None:
        """The newest version that `app_id` has committed to this table, whoever did."""
        return self._log.seen_now(app_id)

    def seen_lately(self, app_id: str) -> int | None:
        """As `seen`; of a table in a bucket, which takes a request to ask, as of ten minutes ago at most."""
        return self._log.seen(app_id) if is_uri(self.place) else self.seen(app_id)


def _lacks(there: Any, wanted: Any) -> bool:
    """Whether a list of structs lacks fields that it should have."""
    if not (isinstance(there, DeltaArray) and isinstance(wanted, DeltaArray)):
        return False
    names = [
        {field.name for field in kind.element_type.fields} if isinstance(kind.element_type, DeltaStruct) else set()
        for kind in (there, wanted)
    ]
    return bool(names[1] - names[0])


def data_files(table: DeltaTable, place: str | Path) -> list[str]:
    """The Parquet files of the version that a handle has open, as paths or URIs.

    Raises:
        ServiceError: the log names a file outside of the table's directory, or the files do not hold the table's rows.
    """
    with answers(str(place)):
        check_whole_files(table, str(place))
    files = [unquote(uri) for uri in table.file_uris()]  # they come percent-encoded, as in a URL
    for file in files:
        if not _is_inside(file, str(place)):
            raise DamagedError(f"the log of {place} names {file!r}, which is not in the table: restore it")
    return files


def _is_inside(file: str, place: str) -> bool:
    if not is_uri(place):  # links in the table stay as they are; those above it deltalake has resolved
        folders = (os.path.abspath(place), os.path.realpath(place))  # noqa: PTH100
        return os.path.abspath(file).startswith(tuple(os.path.join(one, "") for one in folders))  # noqa: PTH100, PTH118
    try:
        check_key(file.removeprefix(f"{place}/"))
    except ServiceError:
        return False
    return file.startswith(f"{place}/")


def added(file: DataFile) -> AddAction:
    """The entry of a file in a commit that adds it; its statistics have at least the number of rows."""
    stats = file.stats or json.dumps({"numRecords": file.rows})
    return AddAction(file.path, file.bytes, dict(file.partition), int(time() * 1000), data_change=True, stats=stats)


def statistics(rows: pa.Table, names: Sequence[str]) -> dict[str, Any]:
    """What a commit tells of a file, for readers that pass over files: rows, and of columns the extremes and nulls.

    Source: "Per-file Statistics" in Delta's protocol. Long strings have no extremes here, nor have nested columns.
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
        low, high = (_told(extremes[end].as_py()) for end in ("min", "max"))
        if low is not None and high is not None:
            least[name], greatest[name] = low, high
    return {"numRecords": rows.num_rows, "minValues": least, "maxValues": greatest, "nullCount": nulls}


def merged_statistics(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The statistics of a file from those of its parts, of which every one has the same columns."""
    nulls = {name: sum(part["nullCount"][name] for part in parts) for name in parts[0]["nullCount"]}
    merged: dict[str, Any] = {"numRecords": sum(part["numRecords"] for part in parts), "nullCount": nulls}
    for key, extreme in (("minValues", min), ("maxValues", max)):
        # A part that has values of a column but not their extremes leaves those of the file unknown.
        known = {
            name: [part[key][name] for part in parts if name in part[key]]
            for name in nulls
            if all(name in part[key] or part["nullCount"][name] == part["numRecords"] for part in parts)
        }
        merged[key] = {name: extreme(values) for name, values in known.items() if values}
    return merged


def _told(value: Any) -> Any:
    """A value as the log's JSON has it; None where it has none."""
    if isinstance(value, datetime):
        return value.isoformat(timespec="microseconds").replace("+00:00", "Z")
    if isinstance(value, str):
        return value if len(value) <= MAX_TOLD else None
    if isinstance(value, float):
        return value if isfinite(value) else None
    return value if isinstance(value, int) else None


def spark_schema(schema: pa.Schema) -> "StructType":
    """An Arrow schema as Spark's."""
    from pyspark.sql.pandas.types import from_arrow_schema

    return from_arrow_schema(schema)
