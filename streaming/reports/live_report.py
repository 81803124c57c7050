"""The HTML report on stored predictions of labelled images, without a JVM.

A stored prediction contains the most probable classes, not the scores of all classes: counts, F1 and calibration are
exact, but log loss and ROC curves are not available; `imagestream report --model N` shows them for held-out images.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from models.evaluation_sums import EvaluationSums
from streaming.errors import NotFoundError
from streaming.query import open_query, query
from streaming.reports.plots import GRID
from streaming.reports.report import KNOWN, NOT_KNOWN
from streaming.reports.report_content import ModelReport, sample_of
from streaming.settings import Settings

SAMPLES = GRID * GRID
MISTAKES = 12
MAX_CLASSES = 500
REST = "(other labels)"
WRONG_REST = "(another of the other labels)"  # a wrong prediction of a row whose true label is counted in REST
TIMEOUT_S = 600.0

ANSWERED = """
, answered AS (
    SELECT p.image_id, coalesce(known.label, p.label_true) AS truth, p.label AS predicted,
           coalesce(p.confidence, 0) AS confidence, p.source, p.model_version,
           p.label = truth OR coalesce(list_contains([one.label FOR one IN p.top_k], truth), false) AS among_best
    FROM predictions p LEFT JOIN known USING (image_id)
    WHERE truth IS NOT NULL AND p.label IS NOT NULL AND ($version::INT IS NULL OR p.model_version = $version)
)
"""
CLASSES = """
SELECT label, bool_or(answer) AS answer, count(*) AS rows
FROM (SELECT predicted AS label, true AS answer FROM answered UNION ALL SELECT truth, false FROM answered)
GROUP BY label ORDER BY answer DESC, rows DESC, label LIMIT $limit
"""
ANSWERS = "SELECT truth, predicted, confidence FROM answered"
COUNTS = """
SELECT count(*) AS labelled, avg(among_best::INT) AS among_best,
       list_sort(list(DISTINCT model_version)) AS versions FROM answered
"""
SHOWN = """
SELECT image_id, truth AS label, predicted, any_value(confidence)::DOUBLE AS confidence, any_value(source) AS source
FROM answered GROUP BY ALL
"""
RANDOM_ROWS = "SELECT * FROM shown ORDER BY hash(image_id), image_id LIMIT $limit"
MOST_CONFIDENT = "SELECT * FROM shown WHERE label <> predicted ORDER BY confidence DESC, image_id LIMIT $limit"


def read_live_report(settings: Settings, version: int | None = None) -> ModelReport:
    """Report on stored predictions of labelled images, of one version or all.

    Raises:
        ServiceError: there are no predictions, or none of labelled images.
    """
    there = set(settings.place.table_names())
    if "predictions" not in there:
        raise NotFoundError(f"no predictions yet in {settings.place.tables}: run `imagestream stream` first")
    reader = _Reader(settings, (KNOWN if "labels" in there else NOT_KNOWN) + ANSWERED, version)
    (counts,) = reader.rows(COUNTS)
    if not counts["labelled"]:
        whose = "" if version is None else f" of version {version}"
        raise NotFoundError(
            f"no prediction{whose} has a label yet: publish images with labels, or add labels with 'imagestream label'"
        )
    evaluation = reader.sums().result()
    shown = f", shown AS ({SHOWN})"
    samples, mistakes = (
        [sample_of(row, [row["source"]] if row["source"] else []) for row in reader.rows(shown + sql, limit=limit)]
        for sql, limit in ((RANDOM_ROWS, SAMPLES), (MOST_CONFIDENT, MISTAKES))
    )
    versions = ", ".join(map(str, counts["versions"]))
    return ModelReport(
        title="Live predictions" + ("" if version is None else f" of model version {version}"),
        about=f"{counts['labelled']:,} stored predictions of labelled images, by model version {versions}",
        evaluation=evaluation,
        balance={"labelled predictions": evaluation.support.tolist()},
        samples=samples,
        mistakes=mistakes,
        notes=[
            f"Stored predictions contain the most probable classes only, so log loss and ROC curves are not available. "
            f"The true class is among these classes for {counts['among_best']:.2%} of the images."
        ],
    )


@dataclass(frozen=True)
class _Reader:
    """Queries over the labelled predictions."""

    settings: Settings
    prefix: str
    version: int | None

    def rows(self, sql: str, **parameters: Any) -> list[dict[str, Any]]:
        table = query(
            self.settings, self.prefix + sql, parameters={"version": self.version, **parameters}, timeout_s=TIMEOUT_S
        )
        found: list[dict[str, Any]] = table.to_pylist()
        return found

    def sums(self) -> EvaluationSums:
        """Return the counts over all labelled predictions, read in batches.

        Predicted classes come first, then other labels by frequency. Labels beyond `MAX_CLASSES` are counted together,
        since there may be as many labels as messages. Predictions are compared with the original labels before that.
        """
        classes = [row["label"] for row in self.rows(CLASSES, limit=MAX_CLASSES)]
        named = pa.array(classes, pa.string())
        rest, wrong_rest = len(classes), len(classes) + 1
        classes += [REST, WRONG_REST]
        sums = EvaluationSums(tuple(classes), len(classes))
        parameters = {"version": self.version}
        with open_query(self.settings, self.prefix + ANSWERS, parameters=parameters, timeout_s=TIMEOUT_S) as batches:
            for batch in batches:
                right = pc.equal(batch.column("truth"), batch.column("predicted")).to_numpy(zero_copy_only=False)
                truth, predicted = (
                    pc.index_in(batch.column(name), named).fill_null(rest).to_numpy(zero_copy_only=False)
                    for name in ("truth", "predicted")
                )
                predicted = np.where((truth == rest) & (predicted == rest) & ~right, wrong_rest, predicted)
                confidence = batch.column("confidence").to_numpy(zero_copy_only=False)
                sums.add_answers(predicted.astype(np.int64), confidence, truth.astype(np.int64))
        return sums
