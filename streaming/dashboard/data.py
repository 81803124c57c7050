"""What the pages show, as plain rows: questions whose answers are bounded, however many rows the tables have."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from models.drift import MEANINGFUL_ROWS
from streaming.dashboard.reader import Reader
from streaming.images.exposure import Exposure
from streaming.registry import Registry
from streaming.reports.paired import CONTENTS, NO_CONTENTS, count_pairs
from streaming.reports.report import AGREEMENT, KNOWN, LABELLED, MAX_JUDGES, SHADOW, VERSIONS, with_accuracies
from streaming.storage.sql import LATEST_LABELS

Rows = list[dict[str, Any]]

POINTS = 120  # of a plot over time
MAX_CHOICES = 200  # of labels, versions or reasons to choose from
MAX_CLASSES = 30  # of a confusion matrix
BATCHES_FOR_RATE = 10
DRIFT_BATCHES = 500


@dataclass(frozen=True)
class Window:
    """A stretch of time that ends now, in steps of equal length."""

    since: datetime
    step_s: float

    @classmethod
    def last(cls, span: timedelta, now: datetime | None = None) -> "Window":
        """The last `span`, in POINTS steps of at least a second."""
        return cls((now or datetime.now(UTC)) - span, max(1.0, span.total_seconds() / POINTS))


@dataclass(frozen=True)
class Filter:
    """Which predictions; None: whatever they hold.

    Attributes:
        confidence: the least and the greatest, both of it.
        source: a part of the name that the image was published under.
        judged: `right` or `wrong` where the true label is known.
    """

    labels: tuple[str, ...] = ()
    versions: tuple[int, ...] = ()
    confidence: tuple[float, float] = (0.0, 1.0)
    source: str = ""
    judged: str | None = None


@dataclass(frozen=True)
class Page:
    """Some of the predictions that a filter leaves, the newest first, and how many there are in all."""

    rows: Rows
    total: int


PER_STEP = """
SELECT time_bucket(to_milliseconds($step_ms), committed_at) AS moment, model_version AS version,
       sum(input_rows)::BIGINT AS images, sum(predicted_rows)::BIGINT AS predicted,
       sum(quarantined_rows)::BIGINT AS quarantined, count(*) AS batches
FROM batches WHERE committed_at >= $since GROUP BY ALL ORDER BY moment, version
"""
SWAPS = """
SELECT committed_at AS moment, model_version AS version, before FROM (
    SELECT committed_at, model_version, lag(model_version) OVER (ORDER BY committed_at) AS before FROM batches)
WHERE before <> model_version AND committed_at >= $since ORDER BY moment DESC LIMIT $limit
"""
# The rows of one batch become visible together, when its commit is done.
LATENCY = """
WITH recent AS (SELECT query_id, batch_id, committed_at FROM batches WHERE committed_at >= $since)
SELECT time_bucket(to_milliseconds($step_ms), committed_at) AS moment, count(*) AS images,
       quantile_cont(epoch(committed_at) - epoch(published_at), 0.5) AS p50,
       quantile_cont(epoch(committed_at) - epoch(published_at), 0.95) AS p95
FROM predictions JOIN recent USING (query_id, batch_id)
WHERE published_at IS NOT NULL AND scored_at >= $since - INTERVAL 1 HOUR GROUP BY moment ORDER BY moment
"""
LATENCY_IN_ALL = LATENCY.replace(
    "SELECT time_bucket(to_milliseconds($step_ms), committed_at) AS moment,", "SELECT"
).replace("GROUP BY moment ORDER BY moment", "")
ACCURACY = """
SELECT time_bucket(to_milliseconds($step_ms), p.scored_at) AS moment, p.model_version AS version, count(*) AS labelled,
       avg((p.label = coalesce(known.label, p.label_true))::INT) AS accuracy
FROM predictions p LEFT JOIN known USING (image_id)
WHERE p.scored_at >= $since AND coalesce(known.label, p.label_true) IS NOT NULL GROUP BY ALL ORDER BY moment, version
"""
LAST_BATCHES = """
SELECT model_version AS version, committed_at, input_rows, element_at(seconds, 'batch')[1] AS seconds, refused
FROM batches ORDER BY committed_at DESC LIMIT $limit
"""
COLUMNS = """image_id, topic, "partition", "offset", published_at, scored_at, source, label_true, label, confidence,
       model_version, batch_id"""
CHOICES = """
SELECT list_sort(list(DISTINCT label))[:$limit] AS labels,
       list_reverse_sort(list(DISTINCT version))[:$limit] AS versions
FROM (SELECT label, model_version AS version FROM predictions GROUP BY ALL)
"""
ONE = """
SELECT p.*, b.committed_at FROM (SELECT * FROM predictions
    WHERE topic = $topic AND "partition" = $partition AND "offset" = $offset LIMIT 1) p
LEFT JOIN batches b USING (query_id, batch_id)
"""
TRUTH = f"coalesce((SELECT g.label FROM ({LATEST_LABELS}) g WHERE g.image_id = predictions.image_id), label_true)"  # noqa: S608
JUDGED = {"right": f"label = {TRUTH}", "wrong": f"label <> {TRUTH}"}
REASONS = """
SELECT reason, count(*) AS messages, count(replayed_at) AS replayed, max(quarantined_at) AS last
FROM quarantine GROUP BY reason ORDER BY messages DESC, reason LIMIT $limit
"""
QUARANTINED = """
SELECT quarantined_at, reason, stage, detail, source, topic, "partition", "offset", image_id, replayed_at
FROM quarantine WHERE $reason::VARCHAR IS NULL OR reason = $reason
ORDER BY quarantined_at DESC, "offset" DESC LIMIT $limit OFFSET $skip
"""
ONE_BAD = """
SELECT reason, stage, detail FROM quarantine
WHERE topic = $topic AND "partition" = $partition AND "offset" = $offset LIMIT 1
"""
BAD_BYTES = """
SELECT value FROM quarantine
WHERE topic = $topic AND "partition" = $partition AND "offset" = $offset LIMIT 1
"""
CONFUSION = """
, answered AS (
    SELECT coalesce(known.label, p.label_true) AS truth, p.label AS predicted
    FROM predictions p LEFT JOIN known USING (image_id) WHERE p.model_version = $version
), often AS (
    SELECT truth FROM answered WHERE truth IS NOT NULL GROUP BY truth ORDER BY count(*) DESC, truth LIMIT $limit
)
SELECT truth, predicted, count(*) AS images FROM answered
WHERE truth IN (FROM often) AND predicted IN (FROM often) GROUP BY ALL ORDER BY truth, predicted
"""
DRIFT = """
SELECT committed_at AS moment, model_version AS version, drift['rows'] AS images, drift['psi_max'] AS psi_max,
       drift['psi_mean'] AS psi_mean, drift['psi_expected'] AS psi_expected, drift['mean_shift'] AS mean_shift,
       drift['low_confidence'] AS low_confidence,
       drift['low_confidence_in_training'] AS low_confidence_in_training,
       drift['window_rows'] AS window_images, drift['window_psi'] AS window_psi,
       drift['p_value'] AS p_value, drift['p_limit'] AS p_limit, drift['alarm'] AS alarm
FROM batches WHERE drift['rows'] >= $least OR drift['p_value'] IS NOT NULL ORDER BY committed_at DESC LIMIT $limit
"""


def throughput(reader: Reader, window: Window) -> Rows:
    """Per step and model version: images, predicted, quarantined, batches, and images_per_s over the step."""
    rows = reader.rows(PER_STEP, since=window.since, step_ms=_step_ms(window))
    return [row | {"images_per_s": row["images"] / window.step_s} for row in rows]


def swaps(reader: Reader, window: Window, limit: int = 20) -> Rows:
    """When another model version began to answer, the newest first: moment, version, before."""
    return reader.rows(SWAPS, since=window.since, limit=limit)


def latency(reader: Reader, window: Window) -> Rows:
    """Per step: seconds from a message's publishing to its row, p50 and p95."""
    return reader.rows(LATENCY, since=window.since, step_ms=_step_ms(window))


def latency_in_all(reader: Reader, window: Window) -> dict[str, Any]:
    """The same over the whole window: images, p50, p95; None where there are none."""
    return reader.rows(LATENCY_IN_ALL, since=window.since)[0]


def accuracy(reader: Reader, window: Window) -> Rows:
    """Per step and version: how many predictions have a known label, and the share of them that is right."""
    return reader.rows(KNOWN + ACCURACY, since=window.since, step_ms=_step_ms(window))


def last_batches(reader: Reader) -> Rows:
    """The newest micro-batches: version, committed_at, input_rows, seconds, refused."""
    return reader.rows(LAST_BATCHES, limit=BATCHES_FOR_RATE)


def choices(reader: Reader) -> tuple[list[str], list[int]]:
    """The labels and the model versions that answers have, at most MAX_CHOICES of each."""
    (row,) = reader.rows(CHOICES, limit=MAX_CHOICES)
    return row["labels"] or [], row["versions"] or []


def predictions(reader: Reader, wanted: Filter, *, limit: int, skip: int = 0) -> Page:
    """One page of the predictions that the filter leaves."""
    conditions, parameters = _conditions(wanted)
    where = f"FROM predictions WHERE {' AND '.join(conditions)}" if conditions else "FROM predictions"
    # The few columns that it is sorted by first, then all columns of a page.
    page = (
        f'SELECT topic, "partition", "offset" {where} ORDER BY scored_at DESC, "offset" DESC LIMIT $limit OFFSET $skip'
    )
    rows = reader.rows(
        f'WITH page AS ({page}) SELECT {COLUMNS} FROM predictions SEMI JOIN page USING (topic, "partition", "offset") '  # noqa: S608
        'ORDER BY scored_at DESC, "offset" DESC',
        **parameters,
        limit=limit,
        skip=skip,
    )
    (total,) = reader.rows(f"SELECT count(*) AS n {where}", **parameters)
    given = given_labels(reader, [row["image_id"] for row in rows])
    return Page([row | {"truth": given.get(row["image_id"], row["label_true"])} for row in rows], total["n"])


def given_labels(reader: Reader, image_ids: list[str]) -> dict[str, str]:
    """Image id → the latest label that it was given later, of those that were."""
    sql = f"FROM ({LATEST_LABELS}) WHERE image_id IN (SELECT unnest($ids::VARCHAR[]))"
    return {row["image_id"]: row["label"] for row in reader.rows(sql, ids=image_ids)}


def one_prediction(reader: Reader, topic: str, partition: int, offset: int) -> dict[str, Any] | None:
    """Every column of a message's prediction, and when its batch was committed; None where there is none."""
    rows = reader.rows(ONE, topic=topic, partition=partition, offset=offset)
    return rows[0] if rows else None


def reasons(reader: Reader) -> Rows:
    """Per reason of the quarantine: messages, how many of them were replayed, and when the last came."""
    return reader.rows(REASONS, limit=MAX_CHOICES)


def quarantined(reader: Reader, reason: str | None, *, limit: int, skip: int = 0) -> Rows:
    """A page of the quarantine without the messages' bytes, the newest first."""
    return reader.rows(QUARANTINED, reason=reason, limit=limit, skip=skip)


def one_quarantined(reader: Reader, topic: str, partition: int, offset: int) -> dict[str, Any] | None:
    """Why a message is quarantined: reason, stage, detail; None where it is not."""
    rows = reader.rows(ONE_BAD, topic=topic, partition=partition, offset=offset)
    return rows[0] if rows else None


def bad_bytes(reader: Reader, topic: str, partition: int, offset: int) -> bytes | None:
    """The bytes of a quarantined message; None where the message had none, or is not in the quarantine."""
    rows = reader.rows(BAD_BYTES, topic=topic, partition=partition, offset=offset)
    return rows[0]["value"] if rows else None


def versions(reader: Reader) -> Rows:
    """Per model version: rows, labelled, accuracy, mean_confidence, first and last."""
    return reader.rows(KNOWN + VERSIONS)


def agreement(reader: Reader, challenger: int) -> dict[str, Any] | None:
    """How a challenger answers beside the champion, as `imagestream report` has it; None where it has not yet."""
    reader.version("features")
    rows = reader.rows(KNOWN + SHADOW + AGREEMENT, version=challenger)
    if not rows:
        return None
    stored = "content_sha256" in reader.table("SELECT * FROM features LIMIT 0").column_names
    contents = CONTENTS if stored else NO_CONTENTS
    labelled = KNOWN + SHADOW + LABELLED.format(contents=contents)
    batches = reader.table(labelled, version=challenger, judges=MAX_JUDGES).to_batches()
    return with_accuracies(rows, count_pairs(batches, Exposure(Registry(reader.home.store), reader.home)))[0]


def confusion(reader: Reader, version: int) -> Rows:
    """truth, predicted, images: of one version's labelled predictions and the MAX_CLASSES most frequent labels."""
    return reader.rows(KNOWN + CONFUSION, version=version, limit=MAX_CLASSES)


def drift(reader: Reader) -> Rows:
    """The newest micro-batches that are large enough for a distance to mean something, or end a window that was judged,
    the oldest of them first."""
    return reader.rows(DRIFT, least=MEANINGFUL_ROWS, limit=DRIFT_BATCHES)[::-1]


def _step_ms(window: Window) -> int:
    return int(window.step_s * 1000)


def _conditions(wanted: Filter) -> tuple[list[str], dict[str, Any]]:
    """The conditions of a filter as SQL, and the values that they name."""
    conditions: list[str] = []
    parameters: dict[str, Any] = {}
    if wanted.labels:
        conditions.append("label IN (SELECT unnest($labels::VARCHAR[]))")
        parameters["labels"] = list(wanted.labels)
    if wanted.versions:
        conditions.append("model_version IN (SELECT unnest($versions::INT[]))")
        parameters["versions"] = list(wanted.versions)
    if wanted.confidence != (0.0, 1.0):
        conditions.append("confidence BETWEEN $least AND $most")
        # The column is of 32 bits: 0.8 there is a little more than 0.8 here.
        parameters["least"], parameters["most"] = (wanted.confidence[0] - 1e-6, wanted.confidence[1] + 1e-6)
    if wanted.source:
        conditions.append("contains(lower(source), lower($source))")
        parameters["source"] = wanted.source
    if wanted.judged is not None:
        conditions.append(JUDGED[wanted.judged])
    return conditions, parameters
