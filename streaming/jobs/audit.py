"""The audit: checks over all history that every message of every micro-batch has exactly one row.

The rules, by the tables alone:

    1. a batch's input = predicted + quarantined = the messages counted in its offset ranges = the rows in `predictions`
       and `quarantine`
    2. these rows are in its offset ranges, each with the counted number, and have its model version and bundle
    3. per (topic, partition), the batches' ranges are adjacent: no overlap, and no gap except accepted losses
    4. (topic, partition, offset) is unique over `predictions` and `quarantine`

A row that was erased on request (`imagestream erase`) still counts, by its record in `erased`.

Rules 1 to 4 imply that no message is missing and none is repeated. Offsets without a message (holes) are reported, with
the number of those that Kafka's log proves to be no lost messages (see `streaming/pipeline/reconcile.py`, C6 and C7).

Each rule is one SQL statement, and all of them see one snapshot. `batches` is opened first: it is committed last, so
the other tables have all of its rows, even while a stream is running. Only one bounded window of offsets is in memory
at a time. `streaming/jobs/audit_broker.py` compares the rows with the messages that Kafka still has.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import pyarrow as pa

from streaming.errors import NotFoundError
from streaming.query import Snapshot, open_snapshot
from streaming.settings import Settings
from streaming.wording import counted

WINDOW_ROWS = 4_000_000  # rows whose offsets are compared at a time
LISTED = 1_000  # the maximum number of listed problems of one kind; all are counted
TIMEOUT_S = 3_600.0

# The common beginning of the statements below; DuckDB does not evaluate unused parts.
VIEWS = """
WITH {rows} AS (
    SELECT topic, "partition", "offset", model_version, bundle_sha256, query_id, batch_id, true AS good
    FROM predictions
    UNION ALL
    SELECT topic, "partition", "offset", model_version, bundle_sha256, query_id, batch_id, false AS good
    FROM quarantine
),
{erased}
range AS (
    SELECT query_id, batch_id, o.topic AS topic, o."partition" AS "partition", o."start" AS "start", o."end" AS "end",
           {counted} AS counted, {log_start} AS log_start
    FROM (SELECT query_id, batch_id, unnest(offsets) AS o FROM batches)
)
"""
# A row that was erased on request still counts for its message.
WITH_ERASED = """
row AS (
    FROM answered
    UNION ALL
    SELECT topic, "partition", "offset", model_version, bundle_sha256, query_id, batch_id, "table" = 'predictions'
    FROM (SELECT DISTINCT topic, "partition", "offset", model_version, bundle_sha256, query_id, batch_id, "table"
          FROM erased) e
    WHERE NOT EXISTS (SELECT 1 FROM answered a
                      WHERE (a.topic, a."partition", a."offset") = (e.topic, e."partition", e."offset"))
),
"""
ERASED = 'SELECT count(DISTINCT (topic, "partition", "offset")) AS n FROM erased'
COUNTED = {"counted": 'coalesce(o."rows", o."end" - o."start")', "log_start": "o.log_start"}
UNCOUNTED = {"counted": 'o."end" - o."start"', "log_start": "NULL::BIGINT"}  # earlier releases had no holes
TOTALS = """
SELECT count(*) AS batches, coalesce(sum(predicted_rows), 0)::BIGINT AS predicted,
       coalesce(sum(quarantined_rows), 0)::BIGINT AS quarantined
FROM batches
"""
SPANS = """
SELECT topic, "partition", min("start") AS "first", max("end") - 1 AS "last",
       sum(counted)::BIGINT AS messages, count(*) AS batches, sum("end" - "start" - counted)::BIGINT AS holes,
       coalesce(sum("end" - "start" - counted) FILTER (log_start <= "start"), 0)::BIGINT AS proven
FROM range GROUP BY topic, "partition" ORDER BY topic, "partition"
"""
REPEATED_BATCHES = """
SELECT query_id, batch_id, count(*) AS n FROM batches GROUP BY query_id, batch_id HAVING n > 1 ORDER BY ALL
"""
ACCOUNTS = """
, found AS (
    SELECT query_id, batch_id, count(*) FILTER (good) AS predicted, count(*) FILTER (NOT good) AS quarantined,
           min(model_version) AS low, max(model_version) AS high,
           min(bundle_sha256) AS low_sha256, max(bundle_sha256) AS high_sha256,
           batch_id = max(batch_id) OVER (PARTITION BY query_id) AS newest
    FROM row GROUP BY query_id, batch_id
),
last AS (SELECT query_id, max(batch_id) AS batch_id FROM batches GROUP BY query_id),
read AS (SELECT query_id, batch_id, sum(counted)::BIGINT AS counted FROM range GROUP BY query_id, batch_id)
SELECT coalesce(b.query_id, f.query_id) AS query_id, coalesce(b.batch_id, f.batch_id) AS batch_id,
       b.batch_id IS NOT NULL AS whole, f.newest AND f.batch_id > coalesce(last.batch_id, -1) AS newest,
       b.input_rows, b.predicted_rows, b.quarantined_rows, b.model_version, b.bundle_sha256,
       coalesce(counted, 0) AS counted,
       coalesce(f.predicted, 0) AS predicted, coalesce(f.quarantined, 0) AS quarantined,
       f.low, f.high, f.low_sha256, f.high_sha256
FROM batches b FULL JOIN found f ON b.query_id = f.query_id AND b.batch_id = f.batch_id
LEFT JOIN last ON last.query_id = f.query_id
LEFT JOIN read ON read.query_id = b.query_id AND read.batch_id = b.batch_id
WHERE b.batch_id IS NULL OR input_rows <> predicted_rows + quarantined_rows OR coalesce(counted, 0) <> input_rows
   OR (coalesce(f.predicted, 0), coalesce(f.quarantined, 0)) <> (predicted_rows, quarantined_rows)
   OR (f.batch_id IS NOT NULL AND (low, high, low_sha256, high_sha256)
       IS DISTINCT FROM (b.model_version, b.model_version, b.bundle_sha256, b.bundle_sha256))
ORDER BY ALL
"""
INSIDE = """
, found AS (
    SELECT query_id, batch_id, topic, "partition", count(*) AS n, min("offset") AS low, max("offset") AS high
    FROM row SEMI JOIN batches USING (query_id, batch_id) GROUP BY query_id, batch_id, topic, "partition"
)
SELECT query_id, batch_id, topic, "partition", "start", "end", counted, coalesce(n, 0) AS n, low, high
FROM range FULL JOIN found USING (query_id, batch_id, topic, "partition")
WHERE "start" IS NULL OR coalesce(n, 0) <> counted OR low < "start" OR high >= "end"
ORDER BY ALL
"""
ADJOINING = """
SELECT * FROM (
    SELECT topic, "partition", query_id, batch_id, "start", "end",
           max("end") OVER (PARTITION BY topic, "partition" ORDER BY "start", "end"
                            ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS before
    FROM range
) WHERE before <> "start" ORDER BY topic, "partition", "start"
"""
# Offsets that were lost before they were read, and skipped with the user's consent.
LEFT_OUT = """
SELECT o.topic AS topic, o."partition" AS "partition", o."start" AS "from", o."end" - 1 AS "to"
FROM (SELECT unnest(left_out) AS o FROM batches) ORDER BY ALL
"""
RANGES_AT = """
SELECT * FROM range WHERE topic = $topic AND "partition" = $partition AND "start" <= $to AND "end" > $from
"""
# Runs of offsets without a row in one range of a batch; the offsets around the range serve as sentinels.
MISSING = """
, here AS (
    SELECT "offset" FROM row
    WHERE query_id = $query_id AND batch_id = $batch_id AND topic = $topic AND "partition" = $partition
      AND "offset" >= $start AND "offset" < $end
    UNION ALL VALUES ($start - 1), ($end)
)
SELECT before + 1 AS "from", "offset" - 1 AS "to"
FROM (SELECT "offset", lag("offset") OVER (ORDER BY "offset") AS before FROM here)
WHERE "offset" - before > 1 ORDER BY ALL
"""
# Runs of offsets with more than one row.
REPEATS = """
, repeated AS (
    SELECT topic, "partition", "offset", count(*) AS n FROM row
    WHERE "offset" >= $start AND "offset" < $end GROUP BY ALL HAVING n > 1
),
run AS (
    SELECT *, "offset" - row_number() OVER (PARTITION BY topic, "partition", n ORDER BY "offset") AS number
    FROM repeated
)
SELECT topic, "partition", n, min("offset") AS "from", max("offset") AS "to"
FROM run GROUP BY topic, "partition", n, number ORDER BY topic, "partition", "from"
"""
REACH = """
SELECT min("offset") AS low, max("offset") AS high, count(DISTINCT (topic, "partition")) AS partitions FROM row
"""


class ProblemKind(StrEnum):
    """The kinds of problems."""

    ACCOUNT = "account"  # a batch's figures, offset ranges and rows do not match
    MODEL = "model"  # rows with another model than their batch
    GAP = "gap"  # offsets without a row
    OVERLAP = "overlap"  # offsets in two batches
    REPEAT = "repeat"  # offsets with more than one row
    NO_BATCH = "no_batch"  # rows of a batch that is not in `batches`, although a later one is
    NOT_IN_KAFKA = "not_in_kafka"  # rows of offsets at which Kafka has no message


@dataclass(frozen=True)
class AuditProblem:
    """A problem: its description, and where it is."""

    kind: ProblemKind
    text: str
    where: dict[str, Any]


@dataclass(frozen=True)
class Span:
    """The batches of one topic partition; offsets are inclusive.

    Attributes:
        messages: in all batches.
        holes: offsets without a message.
        proven: holes that Kafka's log proves to be no lost messages; the others rely on Spark's own check.
    """

    topic: str
    partition: int
    first: int
    last: int
    messages: int
    batches: int
    holes: int = 0
    proven: int = 0


@dataclass(frozen=True)
class Compared:
    """The comparison of one topic partition with Kafka; offsets are inclusive, None if nothing could be compared.

    Attributes:
        held: messages that Kafka has in this range.
        rows: offsets in this range that have a row.
        note: what limits or prevents the comparison.
    """

    topic: str
    partition: int
    first: int | None = None
    last: int | None = None
    held: int = 0
    rows: int = 0
    note: str = ""


@dataclass
class AuditReport:
    """The result of the audit."""

    batches: int = 0
    predicted: int = 0
    quarantined: int = 0
    spans: list[Span] = field(default_factory=list)
    unfinished: list[dict[str, Any]] = field(default_factory=list)  # newest batches, in progress or interrupted
    erased: int = 0  # messages whose rows were erased on request
    left_out: list[dict[str, Any]] = field(default_factory=list)  # accepted losses; offsets are inclusive
    compared: list[Compared] = field(default_factory=list)  # with the broker, if requested
    problems: list[AuditProblem] = field(default_factory=list)  # at most LISTED of a kind
    counts: dict[ProblemKind, int] = field(default_factory=dict)  # of all problems
    searched: set[tuple[Any, ...]] = field(default_factory=set, repr=False)  # ranges whose gaps have been reported

    @property
    def clean(self) -> bool:
        """Whether there are no problems; a batch in progress is not one."""
        return not self.counts

    def add(self, kind: ProblemKind, text: str, **where: Any) -> None:
        self.counts[kind] = self.counts.get(kind, 0) + 1
        if self.counts[kind] <= LISTED:
            self.problems.append(AuditProblem(kind, text, where))


def audit(settings: Settings) -> AuditReport:
    """Check the whole history of the tables; safe while a stream is running.

    Raises:
        ServiceError: the tables of a stream do not exist, or one cannot be read.
    """
    missing = [name for name in ("predictions", "quarantine", "batches") if not settings.place.has_table(name)]
    if missing:
        raise NotFoundError(
            f"nothing to audit in {settings.place.tables}: no table {', '.join(missing)}; "
            "run `imagestream stream` first"
        )
    with open_snapshot(settings) as snapshot:
        tables = AuditTables(snapshot)
        (totals,) = tables.rows(TOTALS)
        report = AuditReport(**totals)
        report.spans = [Span(**row) for row in tables.rows(SPANS)]
        report.left_out = list(_left_out(tables))
        if tables.has_erased:
            report.erased = next(tables.rows(ERASED))["n"]
        _check_accounts(tables, report)
        _check_ranges(tables, report)
        _check_unique(tables, report)
    return report


class AuditTables:
    """A snapshot of the tables, and the views over them."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        with snapshot.query("SELECT offsets FROM batches LIMIT 0") as reader:
            kind = reader.schema.field("offsets").type.value_type
            counts = any(kind.field(number).name == "rows" for number in range(kind.num_fields))
        self.has_erased = "erased" in snapshot.tables
        erased = {"rows": "answered", "erased": WITH_ERASED} if self.has_erased else {"rows": "row", "erased": ""}
        self._views = VIEWS.format(**(COUNTED if counts else UNCOUNTED), **erased)

    def rows(self, sql: str, parameters: dict[str, Any] | None = None) -> Iterator[dict[str, Any]]:
        with self.query(sql, parameters) as reader:
            for batch in reader:
                yield from batch.to_pylist()

    def query(self, sql: str, parameters: dict[str, Any] | None = None) -> AbstractContextManager[pa.RecordBatchReader]:
        return self._snapshot.query(self._views + sql, parameters, TIMEOUT_S)


def _left_out(tables: AuditTables) -> Iterator[dict[str, Any]]:
    with tables.query("SELECT * FROM batches LIMIT 0") as reader:
        if "left_out" not in reader.schema.names:  # a table of an earlier release
            return
    yield from tables.rows(LEFT_OUT)


def _check_accounts(tables: AuditTables, report: AuditReport) -> None:
    for row in tables.rows(REPEATED_BATCHES):
        report.add(ProblemKind.ACCOUNT, f"{_batch(row)} is {row['n']} times in batches", **_id(row))
    for row in tables.rows(ACCOUNTS):
        rows = row["predicted"] + row["quarantined"]
        if not row["whole"] and row["newest"]:
            report.unfinished.append({**_id(row), "predicted": row["predicted"], "quarantined": row["quarantined"]})
        elif not row["whole"]:
            text = f"{_batch(row)} has {counted(rows, 'row')} but is not in batches, although later ones are"
            report.add(ProblemKind.NO_BATCH, text, **_id(row), rows=rows)
        else:
            _check_account(row, report)


def _check_account(row: dict[str, Any], report: AuditReport) -> None:
    recorded = (row["input_rows"], row["predicted_rows"], row["quarantined_rows"])
    found = (row["counted"], row["predicted"], row["quarantined"])
    if recorded != found or recorded[0] != recorded[1] + recorded[2]:
        text = (
            f"{_batch(row)} records {recorded[0]} input, {recorded[1]} predicted, {recorded[2]} quarantined; its "
            f"offsets have {counted(found[0], 'message')}, and there are {found[1]} and {found[2]} rows"
        )
        report.add(ProblemKind.ACCOUNT, text, **_id(row))
    models = {(row["low"], row["low_sha256"]), (row["high"], row["high_sha256"])}
    if found[1] + found[2] and models != {(row["model_version"], row["bundle_sha256"])}:
        text = f"{_batch(row)} has version {row['model_version']}, its rows {row['low']} to {row['high']}"
        report.add(ProblemKind.MODEL, text, **_id(row))


def _check_ranges(tables: AuditTables, report: AuditReport) -> None:
    for row in tables.rows(INSIDE):
        place = {"topic": row["topic"], "partition": row["partition"]}
        outside = row["start"] is None or (row["n"] and (row["low"] < row["start"] or row["high"] >= row["end"]))
        if outside:
            text = f"{_batch(row)} has rows of {_place(row)} from {row['low']} to {row['high']}, outside its offsets"
            report.add(ProblemKind.ACCOUNT, text, **_id(row), **place)
        if row["start"] is not None:
            _name_gaps(tables, report, row)
    for row in tables.rows(ADJOINING):
        place = {"topic": row["topic"], "partition": row["partition"]}
        if row["before"] < row["start"]:
            ends = {"from": row["before"], "to": row["start"] - 1}
            if place | ends in report.left_out:
                continue
            text = f"{_place(row)}: no batch for offsets {ends['from']} to {ends['to']}, before {_batch(row)}"
            report.add(ProblemKind.GAP, text, **place, **ends)
        else:
            ends = {"from": row["start"], "to": min(row["before"], row["end"]) - 1}
            text = f"{_place(row)}: offsets {ends['from']} to {ends['to']} are in {_batch(row)} and in an earlier batch"
            report.add(ProblemKind.OVERLAP, text, **place, **ends, **_id(row))


def _name_gaps(tables: AuditTables, report: AuditReport, row: dict[str, Any]) -> None:
    """Report the offsets without a row in one range of a batch, unless this was done before.

    If the range has holes, they cannot be distinguished from missing rows: then the number of missing rows is reported.
    """
    range_ = {name: row[name] for name in ("query_id", "batch_id", "topic", "partition", "start", "end")}
    key = tuple(range_.values())
    if key in report.searched:
        return
    report.searched.add(key)
    holes = row["end"] - row["start"] - row["counted"]
    if holes:
        gaps = list(tables.rows(MISSING, range_))
        lost = sum(gap["to"] - gap["from"] + 1 for gap in gaps) - holes
        if lost > 0:
            ends = {"from": gaps[0]["from"], "to": gaps[-1]["to"]}
            offsets = f"{ends['from']} to {ends['to']}"
            text = f"{_place(row)}: no row for {counted(lost, 'message')} of offsets {offsets}, of {_batch(row)}"
            report.add(
                ProblemKind.GAP, text, topic=row["topic"], partition=row["partition"], **ends, lost=lost, **_id(row)
            )
        return
    for gap in tables.rows(MISSING, range_):
        text = f"{_place(row)}: no row for offsets {gap['from']} to {gap['to']}, of {_batch(row)}"
        report.add(ProblemKind.GAP, text, topic=row["topic"], partition=row["partition"], **gap, **_id(row))


def _check_unique(tables: AuditTables, report: AuditReport) -> None:
    (reach,) = tables.rows(REACH)
    if reach["low"] is None:
        return
    width = max(1, WINDOW_ROWS // reach["partitions"])
    for start in range(reach["low"], reach["high"] + 1, width):
        for row in tables.rows(REPEATS, {"start": start, "end": start + width}):
            place = {"topic": row["topic"], "partition": row["partition"]}
            text = f"{_place(row)}: {row['n']} rows for each of the offsets {row['from']} to {row['to']}"
            ends = {"from": row["from"], "to": row["to"]}
            report.add(ProblemKind.REPEAT, text, **place, **ends, rows=row["n"])
            # A repeated row can hide a missing one, since the number of rows in the range is right then.
            for range_ in tables.rows(RANGES_AT, {**place, **ends}):
                _name_gaps(tables, report, range_)


def _id(row: dict[str, Any]) -> dict[str, Any]:
    return {"query_id": row["query_id"], "batch_id": row["batch_id"]}


def _batch(row: dict[str, Any]) -> str:
    return f"batch {row['batch_id']} of query {row['query_id']}"


def _place(row: dict[str, Any]) -> str:
    return f"{row['topic']} partition {row['partition']}"
