"""Model quality from the tables: per version, and for champion and challenger on the same images.

Labels are those in the messages, overridden by the latest entry in the table `labels`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from models.drift import MEANINGFUL_ROWS
from streaming.errors import NotFoundError
from streaming.images.membership import TrainingMembership
from streaming.query import open_query, query
from streaming.registry import open_registry
from streaming.reports.paired import PairedAccuracy, contents_of, count_pairs
from streaming.settings import Settings
from streaming.storage.sql import LATEST_LABELS, NO_LABELS

DISAGREEMENTS = 10
MAX_JUDGES = 100_000  # labelled images by which champion and challenger are compared
TIMEOUT_S = 600.0

# `known`: image id → label given later, as `streaming.images.labels` takes it; empty where there is no table of labels.
KNOWN = f"WITH known AS ({LATEST_LABELS})"
NOT_KNOWN = f"WITH known AS ({NO_LABELS})"
VERSIONS = """
SELECT p.model_version AS version, count(*) AS rows,
       count(coalesce(known.label, p.label_true)) AS labelled,
       avg((p.label = coalesce(known.label, p.label_true))::INT) AS accuracy,
       avg(p.confidence) AS mean_confidence, min(p.scored_at)::VARCHAR AS first, max(p.scored_at)::VARCHAR AS last
FROM predictions p LEFT JOIN known USING (image_id)
GROUP BY version ORDER BY version
"""
QUARANTINED = """
SELECT reason, count(*) AS rows, count(replayed_at) AS replayed
FROM quarantine GROUP BY reason ORDER BY rows DESC, reason
"""
SHADOW = """
, shadowed AS (
    SELECT s.*, coalesce(known.label, s.label_true) AS truth FROM shadow s LEFT JOIN known USING (image_id)
    WHERE $version::INT IS NULL OR model_version = $version
)
"""
AGREEMENT = """
SELECT model_version AS challenger, count(*) AS rows, avg((label = champion_label)::INT) AS agreement,
       count(truth) AS labelled, avg(confidence) AS challenger_confidence,
       avg(champion_confidence) AS champion_confidence
FROM shadowed GROUP BY challenger ORDER BY challenger
"""
# The newest labelled images; accuracies are computed on those on which neither was fitted.
LABELLED = """
, judges AS (SELECT * FROM shadowed WHERE truth IS NOT NULL ORDER BY scored_at DESC, image_id LIMIT $judges)
SELECT j.model_version AS version, p.bundle_sha256 AS old_bundle, j.bundle_sha256 AS new_bundle,
       coalesce(c.content, j.image_id) AS image_id, j.image_id AS known_as, j.source, j."key",
       j.champion_label = j.truth AS old_right, j.label = j.truth AS new_right
FROM judges j LEFT JOIN predictions p USING (topic, "partition", "offset")
LEFT JOIN ({contents}) c USING (topic, "partition", "offset")
"""
DIFFERENT = """
SELECT model_version AS challenger, champion_label, label AS challenger_label, count(*) AS rows,
       count(*) FILTER (champion_label = truth) AS champion_right, count(*) FILTER (label = truth) AS challenger_right
FROM shadowed WHERE label <> champion_label GROUP BY ALL
ORDER BY rows DESC, challenger, champion_label, challenger_label LIMIT $limit
"""

# The newest micro-batches that are large enough for a meaningful PSI, or end a tested window.
DRIFT = """
SELECT batch_id, model_version AS version, drift['rows']::BIGINT AS images, drift['psi_max'] AS psi_max,
       drift['component']::BIGINT AS component, drift['psi_mean'] AS psi_mean, drift['mean_shift'] AS mean_shift,
       drift['spread'] AS spread, drift['low_confidence'] AS low_confidence,
       drift['low_confidence_in_training'] AS low_confidence_in_training,
       drift['window_rows']::BIGINT AS window_images, drift['window_psi'] AS window_psi, drift['p_value'] AS p_value,
       drift['p_limit'] AS p_limit, drift['alarm'] = 1 AS alarm
FROM batches WHERE drift['rows'] >= $least OR drift['p_value'] IS NOT NULL ORDER BY committed_at DESC LIMIT $limit
"""


@dataclass(frozen=True)
class Report:
    """The rows of the queries above; every list may be empty."""

    versions: list[dict[str, Any]]
    quarantined: list[dict[str, Any]]
    agreement: list[dict[str, Any]]
    disagreements: list[dict[str, Any]]  # the most frequent ones
    drift: list[dict[str, Any]]  # newest first


def with_accuracies(rows: list[dict[str, Any]], counts: Mapping[int, PairedAccuracy]) -> list[dict[str, Any]]:
    """Add the accuracies of both to rows of `AGREEMENT`, on images on which neither was fitted and on the others."""
    return [row | counts.get(row["challenger"], PairedAccuracy()).as_row("champion", "challenger") for row in rows]


def read_report(settings: Settings, *, challenger: int | None = None, limit: int = DISAGREEMENTS) -> Report:
    """Read the report.

    Args:
        challenger: version of the only challenger to include; None for all.
        limit: maximum number of disagreements and of micro-batches.

    Raises:
        ServiceError: there are no predictions yet.
    """
    there = set(settings.place.table_names())
    if "predictions" not in there:
        raise NotFoundError(f"no predictions yet in {settings.place.tables}: run `imagestream stream` first")
    known = KNOWN if "labels" in there else NOT_KNOWN

    def rows(sql: str, **parameters: Any) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = query(settings, sql, parameters=parameters, timeout_s=TIMEOUT_S).to_pylist()
        return found

    def has_drift() -> bool:
        """A table of an earlier release has no such column until a stream opens it."""
        return "batches" in there and "drift" in query(settings, "SELECT * FROM batches LIMIT 0").schema.names

    def agreement() -> list[dict[str, Any]]:
        labelled = known + SHADOW + LABELLED.format(contents=contents_of(settings))
        parameters = {"version": challenger, "judges": MAX_JUDGES}
        with open_query(settings, labelled, parameters=parameters, timeout_s=TIMEOUT_S) as batches:
            counts = count_pairs(batches, TrainingMembership(open_registry(settings.home), settings.place))
        return with_accuracies(rows(known + SHADOW + AGREEMENT, version=challenger), counts)

    has_shadow = "shadow" in there
    return Report(
        versions=rows(known + VERSIONS),
        quarantined=rows(QUARANTINED) if "quarantine" in there else [],
        agreement=agreement() if has_shadow else [],
        disagreements=rows(known + SHADOW + DIFFERENT, version=challenger, limit=limit) if has_shadow else [],
        drift=rows(DRIFT, least=MEANINGFUL_ROWS, limit=limit) if has_drift() else [],
    )
