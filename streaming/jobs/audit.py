"""The audit: does every message of every micro-batch have exactly one row, over all history?

What must hold, by the tables alone:

    1. a batch's input = predicted + quarantined = its offset ranges = the rows in `predictions` and `quarantine`
    2. those rows lie in its offset ranges, and carry its model version and bundle
    3. per (topic, partition), the batches' ranges adjoin: no overlap, and no gap but those that the user accepted
    4. (topic, partition, offset) is unique over `predictions` and `quarantine`

From 1 to 4 it follows that no message is missing and none is repeated. Each is one SQL statement; all of them see one
snapshot, of which `batches` is opened first: it is committed last, so every row it accounts for is there, also beside a
running stream.
Nothing is held per message but in one bounded window of offsets at a time.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from streaming.errors import ServiceError
from streaming.query import Snapshot, open_snapshot
from streaming.settings import Settings

WINDOW_ROWS = 4_000_000  # rows whose offsets are compared at a time
LISTED = 1_000  # problems of one kind that are told; all are counted
TIMEOUT_S = 3_600.0

# What every statement below begins with; a part that it does not use costs nothing.
VIEWS = """
WITH row AS (
    SELECT topic, "partition", "offset", model_version, bundle_sha256, query_id, batch_id, true AS good
    FROM predictions
    UNION ALL
    SELECT topic, "partition", "offset", model_version, bundle_sha256, query_id, batch_id, false AS good
    FROM quarantine
),
range AS (
    SELECT query_id, batch_id, o.topic AS topic, o."partition" AS "partition", o."start" AS "start", o."end" AS "end"
    FROM (SELECT query_id, batch_id, unnest(offsets) AS o FROM batches)
)
"""
TOTALS = """
SELECT count(*) AS batches, coalesce(sum(predicted_rows), 0)::BIGINT AS predicted,
       coalesce(sum(quarantined_rows), 0)::BIGINT AS quarantined
FROM batches
"""
SPANS = """
SELECT topic, "partition", min("start") AS "first", max("end") - 1 AS "last",
       sum("end" - "start")::BIGINT AS messages, count(*) AS batches
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
last AS (SELECT query_id, max(batch_id) AS batch_id FROM batches GROUP BY query_id)
SELECT coalesce(b.query_id, f.query_id) AS query_id, coalesce(b.batch_id, f.batch_id) AS batch_id,
       b.batch_id IS NOT NULL AS whole, f.newest AND f.batch_id > coalesce(last.batch_id, -1) AS newest,
       b.input_rows, b.predicted_rows, b.quarantined_rows, b.model_version, b.bundle_sha256,
       coalesce(list_sum(list_transform(b.offsets, lambda o: o."end" - o."start")), 0)::BIGINT AS by_offsets,
       coalesce(f.predicted, 0) AS predicted, coalesce(f.quarantined, 0) AS quarantined,
       f.low, f.high, f.low_sha256, f.high_sha256
FROM batches b FULL JOIN found f ON b.query_id = f.query_id AND b.batch_id = f.batch_id
LEFT JOIN last ON last.query_id = f.query_id
WHERE b.batch_id IS NULL OR f.batch_id IS NULL OR input_rows <> predicted_rows + quarantined_rows
   OR by_offsets <> input_rows OR predicted <> predicted_rows OR quarantined <> quarantined_rows
   OR (low, high, low_sha256, high_sha256)
      IS DISTINCT FROM (b.model_version, b.model_version, b.bundle_sha256, b.bundle_sha256)
ORDER BY ALL
"""
INSIDE = """
, found AS (
    SELECT query_id, batch_id, topic, "partition", count(*) AS n, min("offset") AS low, max("offset") AS high
    FROM row SEMI JOIN batches USING (query_id, batch_id) GROUP BY query_id, batch_id, topic, "partition"
)
SELECT query_id, batch_id, topic, "partition", "start", "end", coalesce(n, 0) AS n, low, high
FROM range FULL JOIN found USING (query_id, batch_id, topic, "partition")
WHERE "start" IS NULL OR coalesce(n, 0) <> "end" - "start" OR low < "start" OR high >= "end"
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


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: in words, and where."""

    kind: Kind
    text: str
    where: dict[str, Any]


@dataclass(frozen=True)
class Span:
    """What the batches say of one topic partition; offsets inclusive."""

    topic: str
    partition: int
    first: int
    last: int
    messages: int
    batches: int


@dataclass
class AuditReport:
    """What the audit found."""

    batches: int = 0
    predicted: int = 0
    quarantined: int = 0
    spans: list[Span] = field(default_factory=list)
    unfinished: list[dict[str, Any]] = field(default_factory=list)  # newest batches, in flight or cut off
    left_out: list[dict[str, Any]] = field(default_factory=list)  # offsets lost, and accepted as lost; inclusive
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
        raise ServiceError(
            f"nothing to audit in {settings.place.tables}: no table {', '.join(missing)}; "
            "run `imagestream stream` first"
        )
    with open_snapshot(settings) as tables:
        (totals,) = _rows(tables, TOTALS)
        report = AuditReport(**totals)
        report.spans = [Span(**row) for row in _rows(tables, SPANS)]
        report.left_out = list(_left_out(tables))
        _check_accounts(tables, report)
        _check_ranges(tables, report)
        _check_unique(tables, report)
    return report


def _left_out(tables: Snapshot) -> Iterator[dict[str, Any]]:
    with tables.query("SELECT * FROM batches LIMIT 0") as reader:
        if "left_out" not in reader.schema.names:  # a table that is older than the column
            return
    yield from _rows(tables, LEFT_OUT)


def _check_accounts(tables: Snapshot, report: AuditReport) -> None:
    for row in _rows(tables, REPEATED_BATCHES):
        report.add(Kind.ACCOUNT, f"{_batch(row)} stands {row['n']} times in batches", **_id(row))
    for row in _rows(tables, ACCOUNTS):
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
    found = (row["by_offsets"], row["predicted"], row["quarantined"])
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


def _check_ranges(tables: Snapshot, report: AuditReport) -> None:
    for row in _rows(tables, INSIDE):
        place = {"topic": row["topic"], "partition": row["partition"]}
        outside = row["start"] is None or (row["n"] and (row["low"] < row["start"] or row["high"] >= row["end"]))
        if outside:
            text = f"{_batch(row)} has rows of {_place(row)} from {row['low']} to {row['high']}, outside its offsets"
            report.add(Kind.ACCOUNT, text, **_id(row), **place)
        if row["start"] is not None:
            _name_gaps(tables, report, row)
    for row in _rows(tables, ADJOINING):
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


def _name_gaps(tables: Snapshot, report: AuditReport, row: dict[str, Any]) -> None:
    """Name the offsets without a row in one range of a batch, unless that was done before."""
    range_ = {name: row[name] for name in ("query_id", "batch_id", "topic", "partition", "start", "end")}
    key = tuple(range_.values())
    if key in report.searched:
        return
    report.searched.add(key)
    for gap in _rows(tables, MISSING, range_):
        text = f"{_place(row)}: no row for offsets {gap['from']} to {gap['to']}, of {_batch(row)}"
        report.add(Kind.GAP, text, topic=row["topic"], partition=row["partition"], **gap, **_id(row))


def _check_unique(tables: Snapshot, report: AuditReport) -> None:
    (reach,) = _rows(tables, REACH)
    if reach["low"] is None:
        return
    width = max(1, WINDOW_ROWS // reach["partitions"])
    for start in range(reach["low"], reach["high"] + 1, width):
        for row in _rows(tables, REPEATS, {"start": start, "end": start + width}):
            place = {"topic": row["topic"], "partition": row["partition"]}
            text = f"{_place(row)}: {row['n']} rows for each of the offsets {row['from']} to {row['to']}"
            ends = {"from": row["from"], "to": row["to"]}
            report.add(Kind.REPEAT, text, **place, **ends, rows=row["n"])
            # A row too many can hide one too few: the count of that range is right then.
            for range_ in _rows(tables, RANGES_AT, {**place, **ends}):
                _name_gaps(tables, report, range_)


def _rows(tables: Snapshot, sql: str, parameters: dict[str, Any] | None = None) -> Iterator[dict[str, Any]]:
    with tables.query(VIEWS + sql, parameters, TIMEOUT_S) as reader:
        for batch in reader:
            yield from batch.to_pylist()


def _id(row: dict[str, Any]) -> dict[str, Any]:
    return {"query_id": row["query_id"], "batch_id": row["batch_id"]}


def _batch(row: dict[str, Any]) -> str:
    return f"batch {row['batch_id']} of query {row['query_id']}"


def _place(row: dict[str, Any]) -> str:
    return f"{row['topic']} partition {row['partition']}"
