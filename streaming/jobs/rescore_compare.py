"""What another version answers to history, beside what the stream answered: by SQL over the two tables."""

from dataclasses import dataclass
from typing import Any

from streaming.query import query
from streaming.settings import Settings

CHANGES = 10
TIMEOUT_S = 3_600.0

KNOWN = "SELECT image_id, arg_max(label, labelled_at) AS label FROM labels GROUP BY image_id"
NOT_KNOWN = "SELECT NULL::VARCHAR AS image_id, NULL::VARCHAR AS label WHERE false"
PAIRS = """
WITH known AS ({known}), pairs AS (
    SELECT p.model_version AS old_version, p.label AS old_label, r.label AS new_label,
           p.confidence AS old_confidence, r.confidence AS new_confidence,
           coalesce(known.label, r.label_true) AS truth
    FROM rescored r JOIN predictions p USING (topic, "partition", "offset")
    LEFT JOIN known ON known.image_id = r.image_id
    WHERE r.bundle_sha256 = $bundle AND p.bundle_sha256 <> $bundle
)
"""
AGREEMENT = """
SELECT old_version, count(*) AS rows, avg((new_label = old_label)::INT) AS agreement, count(truth) AS labelled,
       avg((old_label = truth)::INT) AS old_accuracy, avg((new_label = truth)::INT) AS new_accuracy,
       count(*) FILTER (new_label = truth AND old_label <> truth) AS only_new_right,
       count(*) FILTER (new_label <> truth AND old_label = truth) AS only_old_right,
       avg(old_confidence) AS old_confidence, avg(new_confidence) AS new_confidence
FROM pairs GROUP BY old_version ORDER BY old_version
"""
CHANGED = """
SELECT old_label, new_label, count(*) AS rows, count(truth) AS labelled,
       count(*) FILTER (old_label = truth) AS old_right, count(*) FILTER (new_label = truth) AS new_right
FROM pairs WHERE new_label <> old_label GROUP BY ALL ORDER BY rows DESC, old_label, new_label LIMIT $limit
"""


@dataclass(frozen=True)
class Comparison:
    """Rows as the SQL above names them, without those that the same version had answered; either may be empty."""

    agreement: list[dict[str, Any]]  # by the version whose answers are in `predictions`
    changes: list[dict[str, Any]]  # the most frequent ones


def compare(settings: Settings, bundle_sha256: str, *, limit: int = CHANGES) -> Comparison:
    """Compare the answers in `rescored` of one bundle with those in `predictions`, message by message."""
    there = {log.parent.name for log in settings.tables_dir.glob("*/_delta_log")}
    if not {"predictions", "rescored"} <= there:
        return Comparison([], [])
    pairs = PAIRS.format(known=KNOWN if "labels" in there else NOT_KNOWN)
    bundle = {"bundle": bundle_sha256}
    return Comparison(
        query(settings, pairs + AGREEMENT, parameters=bundle, timeout_s=TIMEOUT_S).to_pylist(),
        query(settings, pairs + CHANGED, parameters=bundle | {"limit": limit}, timeout_s=TIMEOUT_S).to_pylist(),
    )
