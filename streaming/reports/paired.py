"""Paired accuracy of two versions on the same labelled messages, separated by training-set membership.

Only images on which neither version was fitted show which one is better on new images.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from streaming.images.membership import TrainingMembership
from streaming.query import query
from streaming.settings import Settings

# The content hash of each message with stored features.
CONTENTS = """
SELECT topic, "partition", "offset", min(content_sha256) AS content FROM features
WHERE topic IS NOT NULL AND content_sha256 IS NOT NULL GROUP BY topic, "partition", "offset"
"""
NO_CONTENTS = """
SELECT NULL::VARCHAR AS topic, NULL::INT AS "partition", NULL::BIGINT AS "offset", NULL::VARCHAR AS content WHERE false
"""


def contents_of(settings: Settings) -> str:
    """Return SQL for the content hash of each message: topic, partition, offset, content."""
    if not settings.place.has_table("features"):
        return NO_CONTENTS
    stored = "content_sha256" in query(settings, "SELECT * FROM features LIMIT 0").schema.names
    return CONTENTS if stored else NO_CONTENTS  # a table of an earlier release has no such column


@dataclass
class PairedAccuracy:
    """Counts of labelled messages and correct predictions.

    Attributes:
        judged: messages of images on which neither version was fitted.
        old_right, new_right: correct predictions of each version among them.
        only_old_right, only_new_right: those that only one version predicts correctly.
        fitted: messages of images on which one version may have been fitted.
        fitted_old_right, fitted_new_right: correct predictions of each version among them.
    """

    judged: int = 0
    old_right: int = 0
    new_right: int = 0
    only_old_right: int = 0
    only_new_right: int = 0
    fitted: int = 0
    fitted_old_right: int = 0
    fitted_new_right: int = 0

    def add(self, old: NDArray[np.bool_], new: NDArray[np.bool_], seen: NDArray[np.bool_]) -> None:
        """Count N messages.

        Args:
            old: whether the old version is correct, (N,).
            new: whether the new version is correct, (N,).
            seen: whether one of them may have been fitted on the image, (N,).
        """
        self.fitted += int(seen.sum())
        self.fitted_old_right += int((old & seen).sum())
        self.fitted_new_right += int((new & seen).sum())
        self.judged += int((~seen).sum())
        self.old_right += int((old & ~seen).sum())
        self.new_right += int((new & ~seen).sum())
        self.only_old_right += int((old & ~new & ~seen).sum())
        self.only_new_right += int((new & ~old & ~seen).sum())

    def as_row(self, old: str = "old", new: str = "new") -> dict[str, Any]:
        """Return the counts and accuracies as columns of a table; accuracies of no messages are None."""
        return {
            "judged": self.judged,
            f"{old}_accuracy": _share(self.old_right, self.judged),
            f"{new}_accuracy": _share(self.new_right, self.judged),
            f"only_{old}_right": self.only_old_right,
            f"only_{new}_right": self.only_new_right,
            "fitted": self.fitted,
            f"fitted_{old}_accuracy": _share(self.fitted_old_right, self.fitted),
            f"fitted_{new}_accuracy": _share(self.fitted_new_right, self.fitted),
        }


def count_pairs(batches: Iterable[pa.RecordBatch], membership: TrainingMembership) -> dict[int, PairedAccuracy]:
    """Count labelled messages by version.

    Args:
        batches: columns version, old_bundle, new_bundle, image_id (of the content), known_as, source, key, old_right,
            new_right.
        membership: tests whether versions may have been fitted on images.
    """
    found: dict[int, PairedAccuracy] = {}
    for batch in batches:
        keys = pa.table(batch.select(["version", "old_bundle", "new_bundle"])).group_by(
            ["version", "old_bundle", "new_bundle"]
        )
        for key in keys.aggregate([]).to_pylist():
            rows = batch.filter(_all_equal(batch, key))
            images = rows.select(["image_id", "known_as", "source", "key"])
            seen = membership.contains(key["old_bundle"], images) | membership.contains(key["new_bundle"], images)
            old, new = (rows.column(name).to_numpy(zero_copy_only=False) for name in ("old_right", "new_right"))
            found.setdefault(key["version"], PairedAccuracy()).add(old.astype(bool), new.astype(bool), seen)
    return found


def _all_equal(batch: pa.RecordBatch, key: dict[str, Any]) -> pa.Array:
    mask = pa.repeat(True, batch.num_rows)
    for name, value in key.items():
        column = batch.column(name)
        mask = pc.and_(mask, column.is_null() if value is None else pc.equal(column, value).fill_null(False))
    return mask


def _share(right: int, rows: int) -> float | None:
    return right / rows if rows else None
