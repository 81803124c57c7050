"""Two versions' answers to the same labelled messages, told apart by whether either was possibly fitted on the image.

Only images that neither was fitted on say which of the two does better on new images.
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

# The content of each message whose features are stored, or nothing where no file has its hash.
CONTENTS = """
SELECT topic, "partition", "offset", min(content_sha256) AS content FROM features
WHERE topic IS NOT NULL AND content_sha256 IS NOT NULL GROUP BY topic, "partition", "offset"
"""
NO_CONTENTS = """
SELECT NULL::VARCHAR AS topic, NULL::INT AS "partition", NULL::BIGINT AS "offset", NULL::VARCHAR AS content WHERE false
"""


def contents_of(settings: Settings) -> str:
    """SQL for the content of each message: topic, partition, offset, content."""
    if not settings.place.has_table("features"):
        return NO_CONTENTS
    stored = "content_sha256" in query(settings, "SELECT * FROM features LIMIT 0").schema.names
    return CONTENTS if stored else NO_CONTENTS  # a table from before there was the column


@dataclass
class Paired:
    """Counts of labelled messages.

    Attributes:
        judged: whose image neither version was fitted on; of them `old_right` and `new_right`, and those that only one
            of the two gets right.
        fitted: the others, with `fitted_old_right` and `fitted_new_right`.
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
        """Count (N,) messages: whether each version is right, and whether one was possibly fitted on the image."""
        self.fitted += int(seen.sum())
        self.fitted_old_right += int((old & seen).sum())
        self.fitted_new_right += int((new & seen).sum())
        self.judged += int((~seen).sum())
        self.old_right += int((old & ~seen).sum())
        self.new_right += int((new & ~seen).sum())
        self.only_old_right += int((old & ~new & ~seen).sum())
        self.only_new_right += int((new & ~old & ~seen).sum())

    def as_row(self, old: str = "old", new: str = "new") -> dict[str, Any]:
        """As columns of a table; shares are None where there is nothing to take them of."""
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


def count_pairs(batches: Iterable[pa.RecordBatch], membership: TrainingMembership) -> dict[int, Paired]:
    """Count labelled messages by version.

    Args:
        batches: version, old_bundle, new_bundle, image_id (of the content), known_as, source, key, old_right,
            new_right.
    """
    found: dict[int, Paired] = {}
    for batch in batches:
        keys = pa.table(batch.select(["version", "old_bundle", "new_bundle"])).group_by(
            ["version", "old_bundle", "new_bundle"]
        )
        for key in keys.aggregate([]).to_pylist():
            rows = batch.filter(_all_equal(batch, key))
            images = rows.select(["image_id", "known_as", "source", "key"])
            seen = membership.contains(key["old_bundle"], images) | membership.contains(key["new_bundle"], images)
            old, new = (rows.column(name).to_numpy(zero_copy_only=False) for name in ("old_right", "new_right"))
            found.setdefault(key["version"], Paired()).add(old.astype(bool), new.astype(bool), seen)
    return found


def _all_equal(batch: pa.RecordBatch, key: dict[str, Any]) -> pa.Array:
    mask = pa.repeat(True, batch.num_rows)
    for name, value in key.items():
        column = batch.column(name)
        mask = pc.and_(mask, column.is_null() if value is None else pc.equal(column, value).fill_null(False))
    return mask


def _share(right: int, rows: int) -> float | None:
    return right / rows if rows else None
