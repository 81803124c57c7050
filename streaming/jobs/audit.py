"""The audit: does every message of every micro-batch have exactly one row, over all history?

What must hold, by the tables alone:

    1. a batch's input = predicted + quarantined = the messages counted in its offset ranges = the rows in `predictions`
       and `quarantine`
    2. those rows lie in its offset ranges, as many in each as were counted, and carry its model version and bundle
    3. per (topic, partition), the batches' ranges adjoin: no overlap, and no gap but those that the user accepted
    4. (topic, partition, offset) is unique over `predictions` and `quarantine`

A row that was erased on request (`imagestream erase`) counts as it did before, by its record in `erased`.

From 1 to 4 it follows that no message is missing and none is repeated. Offsets may have held no message: such holes are
reported, with the number of those that Kafka's log proved to be none (see `streaming/pipeline/account.py`, C6 and C7).

Each rule is one SQL statement; all of them see one snapshot, of which `batches` is opened first: it is committed last,
so every row it accounts for is there, also beside a running stream. Nothing is held per message but in one bounded
window of offsets at a time. `streaming/jobs/audit_broker.py` compares the rows with what Kafka still holds.
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

WINDOW_ROWS = 4_000_000  # rows whose offsets are compared at a time
LISTED = 1_000  # problems of one kind that are told; all are counted
TIMEOUT_S = 3_600.0

# What every statement below begins with; a part that it does not use costs nothing.
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
# A row that was erased on request answers its message as it did before.
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
UNCOUNTED = {"counted": 'o."end" - o."start"', "log_start": "NULL::BIGINT"}  # before holes were counted there were none
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
# Offsets that were lost before they were read, and accepted as lost.
LEFT_OUT = """
SELECT o.topic AS topic, o."partition" AS "partition", o."start" AS "from", o."end" - 1 AS "to"
FROM (SELECT unnest(left_out) AS o FROM batches) ORDER BY ALL
"""
RANGES_AT = """
SELECT * FROM range WHERE topic = $topic AND "partition" = $partition AND "start" <= $to AND "end" > $from
"""
# Runs of offsets without a row in one range of a batch; its two ends stand for rows of their own.
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
# Offsets with more than one row, neighbours as one run.
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


class Kind(StrEnum):
    """What can be wrong."""

    ACCOUNT = "account"  # a batch's figures, offset ranges and rows do not agree
    MODEL = "model"  # rows with another model than their batch's
    GAP = "gap"  # offsets without a row
    OVERLAP = "overlap"  # offsets that two batches claim
    REPEAT = "repeat"  # offsets with more than one row
    NO_BATCH = "no_batch"  # rows of a batch that is not in `batches`, though a later one is
    NOT_IN_KAFKA = "not_in_kafka"  # rows of offsets where Kafka holds no message


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: in words, and where."""

    kind: Kind
    text: str
    where: dict[str, Any]


@dataclass(frozen=True)
class Span:
    """What the batches say about one topic partition; offsets inclusive.

    Attributes:
        holes: offsets that held no message to be read.
        proven: holes of which Kafka's log proved that they are not lost messages; the others are so by Spark's word.
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
    """One topic partition beside what Kafka holds; offsets inclusive, None where nothing could be compared.

    Attributes:
        held: messages that Kafka holds there.
        rows: offsets there that have a row.
        note: what limits the comparison, or prevents it.
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
    """What the audit found."""

    batches: int = 0
    predicted: int = 0
    quarantined: int = 0
    spans: list[Span] = field(default_factory=list)
    unfinished: list[dict[str, Any]] = field(default_factory=list)  # newest batches, in flight or cut off
    erased: int = 0  # messages whose rows were erased on request
    left_out: list[dict[str, Any]] = field(default_factory=list)  # offsets lost, and accepted as lost; inclusive
    compared: list[Compared] = field(default_factory=list)  # with the broker, if it was asked
    problems: list[Problem] = field(default_factory=list)  # at most LISTED of a kind
    counts: dict[Kind, int] = field(default_factory=dict)  # all of them
    searched: set[tuple[Any, ...]] = field(default_factory=set, repr=False)  # ranges whose gaps are named

    @property
    def clean(self) -> bool:
        """Whether nothing is wrong; a batch in flight is not wrong."""
        return not self.counts

    def add(self, kind: Kind, text: str, **where: Any) -> None:
        self.counts[kind] = self.counts.get(kind, 0) + 1
        if self.counts[kind] <= LISTED:
            self.problems.append(Problem(kind, text, where))


def audit(settings: Settings) -> AuditReport:
    """Check all history of the tables; safe beside a running stream.

    Raises:
        ServiceError: there are no tables of a stream, or one cannot be read.
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
    """The tables of one moment, and the views over them."""

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
        if "left_out" not in reader.schema.names:  # a table that is older than the column
            return
    yield from tables.rows(LEFT_OUT)


def _check_accounts(tables: AuditTables, report: AuditReport) -> None:
    for row in tables.rows(REPEATED_BATCHES):
        report.add(Kind.ACCOUNT, f"{_batch(row)} stands {row['n']} times in batches", **_id(row))
    for row in tables.rows(ACCOUNTS):
        rows = row["predicted"] + row["quarantined"]
        if not row["whole"] and row["newest"]:
            report.unfinished.append({**_id(row), "predicted": row["predicted"], "quarantined": row["quarantined"]})
        elif not row["whole"]:
            text = f"{_batch(row)} has {rows} rows but is not in batches, though later ones are"
            report.add(Kind.NO_BATCH, text, **_id(row), rows=rows)
        else:
            _check_account(row, report)


def _check_account(row: dict[str, Any], report: AuditReport) -> None:
    said = (row["input_rows"], row["predicted_rows"], row["quarantined_rows"])
    found = (row["counted"], row["predicted"], row["quarantined"])
    if said != found or said[0] != said[1] + said[2]:
        text = (
            f"{_batch(row)} says {said[0]} input, {said[1]} predicted, {said[2]} quarantined; its offsets say "
            f"{found[0]}, and there are {found[1]} and {found[2]} rows"
        )
        report.add(Kind.ACCOUNT, text, **_id(row))
    models = {(row["low"], row["low_sha256"]), (row["high"], row["high_sha256"])}
    if found[1] + found[2] and models != {(row["model_version"], row["bundle_sha256"])}:
        text = f"{_batch(row)} is of version {row['model_version']}, its rows of {row['low']} to {row['high']}"
        report.add(Kind.MODEL, text, **_id(row))


def _check_ranges(tables: AuditTables, report: AuditReport) -> None:
    for row in tables.rows(INSIDE):
        place = {"topic": row["topic"], "partition": row["partition"]}
        outside = row["start"] is None or (row["n"] and (row["low"] < row["start"] or row["high"] >= row["end"]))
        if outside:
            text = f"{_batch(row)} has rows of {_place(row)} from {row['low']} to {row['high']}, outside its offsets"
            report.add(Kind.ACCOUNT, text, **_id(row), **place)
        if row["start"] is not None:
            _name_gaps(tables, report, row)
    for row in tables.rows(ADJOINING):
        place = {"topic": row["topic"], "partition": row["partition"]}
        if row["before"] < row["start"]:
            ends = {"from": row["before"], "to": row["start"] - 1}
            if place | ends in report.left_out:
                continue
            text = f"{_place(row)}: no batch for offsets {ends['from']} to {ends['to']}, before {_batch(row)}"
            report.add(Kind.GAP, text, **place, **ends)
        else:
            ends = {"from": row["start"], "to": min(row["before"], row["end"]) - 1}
            text = (
                f"{_place(row)}: offsets {ends['from']} to {ends['to']} are also an earlier batch's than {_batch(row)}"
            )
            report.add(Kind.OVERLAP, text, **place, **ends, **_id(row))


def _name_gaps(tables: AuditTables, report: AuditReport, row: dict[str, Any]) -> None:
    """Name the offsets without a row in one range of a batch, unless that was done before.

    Which of them held no message is not known where there are any: then it is said how many are missing, and where.
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
            text = (
                f"{_place(row)}: no row for {lost} messages of offsets {ends['from']} to {ends['to']}, of {_batch(row)}"
            )
            report.add(Kind.GAP, text, topic=row["topic"], partition=row["partition"], **ends, lost=lost, **_id(row))
        return
    for gap in tables.rows(MISSING, range_):
        text = f"{_place(row)}: no row for offsets {gap['from']} to {gap['to']}, of {_batch(row)}"
        report.add(Kind.GAP, text, topic=row["topic"], partition=row["partition"], **gap, **_id(row))


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
            report.add(Kind.REPEAT, text, **place, **ends, rows=row["n"])
            # A row too many can hide one too few: the count of that range is right then.
            for range_ in tables.rows(RANGES_AT, {**place, **ends}):
                _name_gaps(tables, report, range_)


def _id(row: dict[str, Any]) -> dict[str, Any]:
    return {"query_id": row["query_id"], "batch_id": row["batch_id"]}


def _batch(row: dict[str, Any]) -> str:
    return f"batch {row['batch_id']} of query {row['query_id']}"


def _place(row: dict[str, Any]) -> str:
    return f"{row['topic']} partition {row['partition']}"
