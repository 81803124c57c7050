"""Compares the answers of a rescoring with those of the stream, by SQL over the two tables.

Accuracy on images that a version was fitted on is biased. So the versions are compared on images that neither was
fitted on, and their accuracies on the other labelled images are reported separately.
"""

from dataclasses import dataclass
from typing import Any

from streaming.images.membership import TrainingMembership
from streaming.query import open_query, query
from streaming.registry import open_registry
from streaming.reports.paired import PairedAccuracy, contents_of, count_pairs
from streaming.settings import Settings
from streaming.storage.sql import LATEST_LABELS, NO_LABELS

CHANGES = 10
TIMEOUT_S = 3_600.0

PAIRS = """
WITH known AS ({known}), pairs AS (
    SELECT p.model_version AS old_version, p.label AS old_label, r.label AS new_label,
           p.confidence AS old_confidence, r.confidence AS new_confidence,
           coalesce(known.label, r.label_true) AS truth, p.bundle_sha256 AS old_bundle,
           r.topic, r."partition", r."offset", r.image_id, r.source, r."key"
    FROM rescored r JOIN predictions p USING (topic, "partition", "offset")
    LEFT JOIN known ON known.image_id = r.image_id
    WHERE r.bundle_sha256 = $bundle AND p.bundle_sha256 <> $bundle
)
"""
AGREEMENT = """
SELECT old_version, count(*) AS rows, avg((new_label = old_label)::INT) AS agreement, count(truth) AS labelled,
       avg(old_confidence) AS old_confidence, avg(new_confidence) AS new_confidence
FROM pairs GROUP BY old_version ORDER BY old_version
"""
LABELLED = """
SELECT old_version AS version, old_bundle, $bundle AS new_bundle, coalesce(content, image_id) AS image_id,
       image_id AS known_as, source, "key", old_label = truth AS old_right, new_label = truth AS new_right
FROM pairs LEFT JOIN ({contents}) USING (topic, "partition", "offset") WHERE truth IS NOT NULL
"""
CHANGED = """
SELECT old_label, new_label, count(*) AS rows, count(truth) AS labelled,
       count(*) FILTER (old_label = truth) AS old_right, count(*) FILTER (new_label = truth) AS new_right
FROM pairs WHERE new_label <> old_label GROUP BY ALL ORDER BY rows DESC, old_label, new_label LIMIT $limit
"""


@dataclass(frozen=True)
class RescoreComparison:
    """The rows of the SQL above, excluding messages that the same version had scored; either list may be empty.

    Attributes:
        agreement: one row per version in `predictions`. Accuracies are those of the `judged` messages, whose images
            neither version was fitted on; those of the other labelled messages are named `fitted_…`.
        changes: the most frequent changes of the label.
    """

    agreement: list[dict[str, Any]]
    changes: list[dict[str, Any]]


def compare(settings: Settings, bundle_sha256: str, *, limit: int = CHANGES) -> RescoreComparison:
    """Compare the answers in `rescored` of one bundle with those in `predictions`, message by message."""
    there = set(settings.place.table_names())
    if not {"predictions", "rescored"} <= there:
        return RescoreComparison([], [])
    pairs = PAIRS.format(known=LATEST_LABELS if "labels" in there else NO_LABELS)
    bundle = {"bundle": bundle_sha256}
    agreement = query(settings, pairs + AGREEMENT, parameters=bundle, timeout_s=TIMEOUT_S).to_pylist()
    labelled = pairs + LABELLED.format(contents=contents_of(settings))
    with open_query(settings, labelled, parameters=bundle, timeout_s=TIMEOUT_S) as batches:
        counts = count_pairs(batches, TrainingMembership(open_registry(settings.home), settings.place))
    return RescoreComparison(
        [row | counts.get(row["old_version"], PairedAccuracy()).as_row() for row in agreement],
        query(settings, pairs + CHANGED, parameters=bundle | {"limit": limit}, timeout_s=TIMEOUT_S).to_pylist(),
    )
