"""Erases images permanently, and records it, so that the audit still passes.

    1. find all ids of the images: an image is identified by its content, regardless of its id
    2. record the identity of every row to erase in the table `erased`: topic, partition, offset and batch, but nothing
       about the image itself; the audit counts such an offset as processed
    3. remove the rows from every table, by rewriting the files that contain them
    4. delete the old files, including those of earlier versions of a table, which a query `--at` an earlier time can no
       longer read

After a crash, it can be run again: rows that have been erased are not found again.
"""

import uuid
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from deltalake.exceptions import DeltaError

from streaming.errors import ConflictError, DamagedError, NotFoundError
from streaming.jobs.audit import ProblemKind, audit
from streaming.jobs.rewrite import ATTEMPTS, replace_files, write_copy
from streaming.pipeline.finish import Tables, finish_decided
from streaming.query import query
from streaming.settings import Settings
from streaming.storage.files import local_copy, read_batches
from streaming.storage.home import TABLES_FOLDER, Home
from streaming.storage.store import open_store
from streaming.storage.table_log import open_delta, open_log, store_errors_in_one_line
from streaming.storage.tables import ERASED, Table

ID_COLUMNS = ("image_id", "content_sha256", "value_sha256")  # that identify an image in some table
CHANGE_DATA = "_change_data"  # the folder of Delta's change data feed
ANSWERED = ("predictions", "quarantine")

NAMES = """
WITH known AS (SELECT DISTINCT image_id, content_sha256 FROM features),
content AS (SELECT content_sha256 FROM known WHERE image_id IN (SELECT unnest($ids::VARCHAR[]))
            UNION SELECT unnest($ids::VARCHAR[]))
SELECT DISTINCT image_id FROM known WHERE content_sha256 IN (FROM content)
"""
IDENTITIES = """
SELECT topic, "partition", "offset", model_version, bundle_sha256, query_id, batch_id, '{table}' AS "table"
FROM {table} WHERE image_id IN (SELECT unnest($ids::VARCHAR[])) {or_content}
"""
# The number of missing predictions of each batch.
SHORT = """
SELECT query_id, batch_id, any_value(b.model_version) AS model_version, any_value(b.bundle_sha256) AS bundle_sha256,
       any_value(predicted_rows) - count(p."offset") AS missing_predicted
FROM batches b LEFT JOIN predictions p USING (query_id, batch_id) GROUP BY query_id, batch_id
"""


@dataclass(frozen=True)
class Erasure:
    """The result of an erasure.

    Attributes:
        ids: all ids of the images.
        rows: table → erased rows.
        files_removed: deleted files that contained them.
        messages: topic, partition and offset of the messages, which stay in Kafka until the topic's retention ends.
    """

    ids: list[str]
    rows: dict[str, int]
    files_removed: int
    messages: list[tuple[str, int, int]]


def erase(settings: Settings, ids: Collection[str], by: str) -> Erasure:
    """Erase images from all tables of the home, and record it in the table `erased`.

    Args:
        ids: image ids as in the tables.
        by: who requested it, for the record.

    Raises:
        ServiceError: there are no tables, no table has the images, or a table cannot be rewritten.
    """
    home = settings.place
    if not home.has_table("predictions") and not home.has_table("features"):
        raise NotFoundError(f"no images yet in {home.tables}: nothing to erase")
    tables = Tables(home.tables)
    for stream in home.store.folders("streams"):
        finish_decided(settings, stream, tables)  # so that rows of decided batches are found
    names = _names(settings, ids)
    gone = _identities(settings, names)
    if gone.num_rows:
        now = datetime.now(UTC)
        record = gone.append_column("erased_at", pa.array([now] * gone.num_rows, ERASED.field("erased_at").type))
        record = record.append_column("by", pa.array([by] * gone.num_rows, pa.string()))
        Table(home.tables, "erased").append(record.select(ERASED.names).cast(ERASED), f"erase-{uuid.uuid4()}", 0)
    rows, removed = {}, 0
    for table in home.table_names():
        n = _erase_rows(home, table, names)
        if n:
            rows[table] = n
        removed += _remove_files(home, table, names)
    if not rows and not removed:
        raise NotFoundError(f"no table in {home.tables} has an image with the id {', '.join(sorted(ids))[:200]}")
    columns = (gone.column(name).to_pylist() for name in ("topic", "partition", "offset"))
    return Erasure(sorted(names), rows, removed, sorted(zip(*columns, strict=True)))


def record_deleted(settings: Settings, by: str) -> int:
    """Record rows that another program has deleted from `predictions` and `quarantine` as erased; return their number.

    Raises:
        ServiceError: there is nothing to audit, or the audit finds other problems than missing rows.
    """
    report = audit(settings)
    others = set(report.counts) - {ProblemKind.GAP, ProblemKind.ACCOUNT}
    gaps = [
        problem.where for problem in report.problems if problem.kind is ProblemKind.GAP and "batch_id" in problem.where
    ]
    if others or len(gaps) != report.counts.get(ProblemKind.GAP, 0):
        raise DamagedError("the tables have other problems than missing rows: see `imagestream audit`")
    if not gaps:
        return 0
    short = {(row["query_id"], row["batch_id"]): row for row in query(settings, SHORT).to_pylist()}
    now, rows = datetime.now(UTC), []
    for gap in gaps:
        batch = short[gap["query_id"], gap["batch_id"]]
        for offset in range(gap["from"], gap["to"] + 1):
            batch["missing_predicted"] -= 1
            table = ANSWERED[0] if batch["missing_predicted"] >= 0 else ANSWERED[1]
            place = {"topic": gap["topic"], "partition": gap["partition"], "offset": offset, "table": table}
            rows.append(batch | place | {"erased_at": now, "by": by})
    record = pa.Table.from_pylist(rows, schema=ERASED)
    Table(settings.place.tables, "erased").append(record, f"erase-{uuid.uuid4()}", 0)
    return len(rows)


def _names(settings: Settings, ids: Collection[str]) -> set[str]:
    """The ids, and all other ids of images with the same content."""
    names = set(ids)
    if settings.place.has_table("features"):
        known = query(settings, NAMES, parameters={"ids": sorted(names)}).column(0)
        names |= {name for name in known.to_pylist() if name is not None}
    return names


def _identities(settings: Settings, names: Collection[str]) -> pa.Table:
    """The identities of the images' rows in `predictions` and `quarantine`, which the audit expects."""
    found = []
    for table in ANSWERED:
        if settings.place.has_table(table):
            of_content = "OR value_sha256 IN (SELECT unnest($ids::VARCHAR[]))" if table == "quarantine" else ""
            sql = IDENTITIES.format(table=table, or_content=of_content)
            found.append(query(settings, sql, parameters={"ids": sorted(names)}))
    return pa.concat_tables(found, promote_options="permissive") if found else ERASED.empty_table()


def _erase_rows(home: Home, name: str, names: Collection[str]) -> int:
    """Rewrite the files of a table without the rows of the images; returns the number of erased rows."""
    place = home.table(name)
    wanted = pa.array(sorted(names), pa.string())
    erased = 0

    def others(rows: pa.Table) -> pa.Table:
        return rows.filter(pc.invert(_of_images(rows, wanted)))

    for _ in range(ATTEMPTS):
        log = open_log(place)
        schema = log.data_schema()
        columns = [column for column in ID_COLUMNS if column in schema.names]
        if not columns:
            return 0
        number, lost = log.next_rewrite(), False
        for file in log.files():
            n, total = _count(place, file.path, wanted)
            if not n:
                continue
            log.check_rewritable()
            copies = [] if n == total else [write_copy(place, [file], schema, others)]
            if not replace_files(log, number, [file], copies, data_change=True):
                lost = True
                break
            number, erased = number + 1, erased + n
        if not lost:
            return erased
    raise ConflictError(f"{place} is being rewritten repeatedly: stop `maintain` and `replay`, and try again")


def _remove_files(home: Home, name: str, names: Collection[str]) -> int:
    """Delete the files of earlier versions that contain rows of the images; returns their number."""
    place = home.table(name)
    wanted = pa.array(sorted(names), pa.string())
    found = [path for path in _unused(place) if _count(place, path, wanted)[0]]
    home.store.delete(f"{TABLES_FOLDER}/{name}/{path}" for path in found)
    return len(found)


def _unused(place: str) -> Iterator[str]:
    """The files of earlier versions of a table, and of its change data feed."""
    try:
        with store_errors_in_one_line(place):
            table = open_delta(place)
            yield from table.vacuum(retention_hours=0, dry_run=True, enforce_retention_duration=False)
    except DeltaError as error:
        raise DamagedError(f"{place} cannot be read: {' '.join(str(error).split())}") from error
    for stored in open_store(place).list(CHANGE_DATA):
        yield stored.key


def _count(place: str, path: str, wanted: pa.Array) -> tuple[int, int]:
    """The number of rows of the images, and of all rows, in a file; 0 if the file has been deleted."""
    found = total = 0
    try:
        with local_copy(place, path) as file:
            if not file.is_file():
                return 0, 0
            columns = [name for name in pq.read_schema(file).names if name in ID_COLUMNS]
            for batch in read_batches(file, columns):
                total += batch.num_rows
                found += pc.sum(_of_images(pa.Table.from_batches([batch]), wanted)).as_py() or 0
    except (OSError, pa.ArrowException) as error:
        raise DamagedError(f"{place}/{path} cannot be read: {str(error).splitlines()[0]}; restore it") from error
    return found, total


def _of_images(rows: pa.Table, wanted: pa.Array) -> pa.Array:
    """A mask of the rows of the images."""
    of_images = pa.array([False] * rows.num_rows)
    for name in set(ID_COLUMNS) & set(rows.schema.names):
        column = rows.column(name).cast(pa.string())
        of_images = pc.or_(of_images, pc.is_in(column, value_set=wanted))
    return of_images
