"""Queries of the dashboard's pages. Every result is bounded, regardless of the number of rows in the tables."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from models.drift import MEANINGFUL_ROWS
from streaming.dashboard.reader import Reader
from streaming.images.membership import TrainingMembership
from streaming.registry import Registry
from streaming.reports.paired import CONTENTS, NO_CONTENTS, count_pairs
from streaming.reports.report import AGREEMENT, KNOWN, LABELLED, MAX_JUDGES, SHADOW, VERSIONS, with_accuracies
from streaming.storage.sql import LATEST_LABELS

Rows = list[dict[str, Any]]

POINTS = 120  # number of steps of a chart over time
MAX_CHOICES = 200  # maximum number of labels, versions or reasons in a filter
MAX_CLASSES = 30  # maximum number of classes of a confusion matrix
BATCHES_FOR_RATE = 10
DRIFT_BATCHES = 500


@dataclass(frozen=True)
class Window:
    """A time range that ends now, divided into steps of equal length."""

    since: datetime
    step_s: float

    @classmethod
    def last(cls, span: timedelta, now: datetime | None = None) -> "Window":
        """Return the range of length `span` in at most POINTS steps of at least a second."""
        return cls((now or datetime.now(UTC)) - span, max(1.0, span.total_seconds() / POINTS))


@dataclass(frozen=True)
class Filter:
    """A filter of predictions; empty attributes and None select all.

    Attributes:
        confidence: minimum and maximum confidence, both inclusive.
        source: substring of the image's source.
        judged: `right` or `wrong`, of predictions whose true label is known.
    """

    labels: tuple[str, ...] = ()
    versions: tuple[int, ...] = ()
    confidence: tuple[float, float] = (0.0, 1.0)
    source: str = ""
    judged: str | None = None


@dataclass(frozen=True)
class PredictionsPage:
    """A page of filtered predictions, newest first, and the total number of them."""

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
# All rows of a batch become visible at its commit.
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
TRUE_LABEL = f"coalesce((SELECT g.label FROM ({LATEST_LABELS}) g WHERE g.image_id = predictions.image_id), label_true)"  # noqa: S608
JUDGED = {"right": f"label = {TRUE_LABEL}", "wrong": f"label <> {TRUE_LABEL}"}
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
# Not a column of `ONE_BAD`, which the page Upload polls: the bytes can be large.
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
    """Return images, predicted, quarantined, batches and images_per_s per step and model version."""
    rows = reader.rows(PER_STEP, since=window.since, step_ms=_step_ms(window))
    return [row | {"images_per_s": row["images"] / window.step_s} for row in rows]


def swaps(reader: Reader, window: Window, limit: int = 20) -> Rows:
    """Return the changes of model version, newest first: moment, version, before."""
    return reader.rows(SWAPS, since=window.since, limit=limit)


def latency(reader: Reader, window: Window) -> Rows:
    """Return the latency from publishing to the committed row per step, in seconds: p50 and p95."""
    return reader.rows(LATENCY, since=window.since, step_ms=_step_ms(window))


def latency_in_all(reader: Reader, window: Window) -> dict[str, Any]:
    """Return the latency over the whole window: images, p50 and p95; None if there are no images."""
    return reader.rows(LATENCY_IN_ALL, since=window.since)[0]


def accuracy(reader: Reader, window: Window) -> Rows:
    """Return the number of labelled predictions and their accuracy per step and model version."""
    return reader.rows(KNOWN + ACCURACY, since=window.since, step_ms=_step_ms(window))


def last_batches(reader: Reader) -> Rows:
    """Return the newest micro-batches: version, committed_at, input_rows, seconds, refused."""
    return reader.rows(LAST_BATCHES, limit=BATCHES_FOR_RATE)


def choices(reader: Reader) -> tuple[list[str], list[int]]:
    """Return the labels and model versions of the predictions, at most MAX_CHOICES of each."""
    (row,) = reader.rows(CHOICES, limit=MAX_CHOICES)
    return row["labels"] or [], row["versions"] or []


def predictions(reader: Reader, wanted: Filter, *, limit: int, skip: int = 0) -> PredictionsPage:
    """Return a page of the predictions that match a filter.

    Args:
        limit: number of predictions per page.
        skip: number of predictions before the page.
    """
    conditions, parameters = _conditions(wanted)
    where = f"FROM predictions WHERE {' AND '.join(conditions)}" if conditions else "FROM predictions"
    # Sort by few columns first, then read all columns of the page.
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
    return PredictionsPage([row | {"truth": given.get(row["image_id"], row["label_true"])} for row in rows], total["n"])


def given_labels(reader: Reader, image_ids: list[str]) -> dict[str, str]:
    """Return image id → label for images that were labelled after publishing."""
    sql = f"FROM ({LATEST_LABELS}) WHERE image_id IN (SELECT unnest($ids::VARCHAR[]))"
    return {row["image_id"]: row["label"] for row in reader.rows(sql, ids=image_ids)}


def one_prediction(reader: Reader, topic: str, partition: int, offset: int) -> dict[str, Any] | None:
    """Return a message's prediction and the commit time of its batch; None if it has none."""
    rows = reader.rows(ONE, topic=topic, partition=partition, offset=offset)
    return rows[0] if rows else None


def reasons(reader: Reader) -> Rows:
    """Return the number of quarantined and replayed messages and the time of the last one, per reason."""
    return reader.rows(REASONS, limit=MAX_CHOICES)


def quarantined(reader: Reader, reason: str | None, *, limit: int, skip: int = 0) -> Rows:
    """Return a page of quarantined messages without their bytes, newest first; all if there is no `reason`."""
    return reader.rows(QUARANTINED, reason=reason, limit=limit, skip=skip)


def one_quarantined(reader: Reader, topic: str, partition: int, offset: int) -> dict[str, Any] | None:
    """Return reason, stage and detail of a quarantined message; None if it is not quarantined."""
    rows = reader.rows(ONE_BAD, topic=topic, partition=partition, offset=offset)
    return rows[0] if rows else None


def bad_bytes(reader: Reader, topic: str, partition: int, offset: int) -> bytes | None:
    """Return the bytes of a quarantined message; None if it has none or is not quarantined."""
    rows = reader.rows(BAD_BYTES, topic=topic, partition=partition, offset=offset)
    return rows[0]["value"] if rows else None


def versions(reader: Reader) -> Rows:
    """Return rows, labelled, accuracy, mean_confidence, first and last per model version."""
    return reader.rows(KNOWN + VERSIONS)


def agreement(reader: Reader, challenger: int) -> dict[str, Any] | None:
    """Return the comparison of a challenger with the champion, as in `imagestream report`; None without predictions."""
    reader.version("features")
    rows = reader.rows(KNOWN + SHADOW + AGREEMENT, version=challenger)
    if not rows:
        return None
    stored = "content_sha256" in reader.table("SELECT * FROM features LIMIT 0").column_names
    contents = CONTENTS if stored else NO_CONTENTS
    labelled = KNOWN + SHADOW + LABELLED.format(contents=contents)
    batches = reader.table(labelled, version=challenger, judges=MAX_JUDGES).to_batches()
    return with_accuracies(rows, count_pairs(batches, TrainingMembership(Registry(reader.home.store), reader.home)))[0]


def confusion(reader: Reader, version: int) -> Rows:
    """Return truth, predicted and images of a version's labelled predictions, for the MAX_CLASSES most frequent
    labels."""
    return reader.rows(KNOWN + CONFUSION, version=version, limit=MAX_CLASSES)


def drift(reader: Reader) -> Rows:
    """Return the newest micro-batches that are large enough for a meaningful PSI or end a tested window, oldest
    first."""
    return reader.rows(DRIFT, least=MEANINGFUL_ROWS, limit=DRIFT_BATCHES)[::-1]


def _step_ms(window: Window) -> int:
    return int(window.step_s * 1000)


def _conditions(wanted: Filter) -> tuple[list[str], dict[str, Any]]:
    """Return the SQL conditions of a filter and their parameters."""
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
        # The column is float32, whose 0.8 is slightly greater than the float64 one.
        parameters["least"], parameters["most"] = (wanted.confidence[0] - 1e-6, wanted.confidence[1] + 1e-6)
    if wanted.source:
        conditions.append("contains(lower(source), lower($source))")
        parameters["source"] = wanted.source
    if wanted.judged is not None:
        conditions.append(JUDGED[wanted.judged])
    return conditions, parameters
