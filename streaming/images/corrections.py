"""Labels added after publishing, from a CSV or over HTTP: rows of the table `labels` for images in the tables."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa

from producer.labelled_csv import PATH_COLUMNS
from streaming.errors import NotFoundError
from streaming.images.labels_csv import LabelRows, read_labels
from streaming.query import query
from streaming.settings import Settings
from streaming.storage.sql import LATEST_LABELS
from streaming.storage.tables import LABELS, Table

# The columns of any CSV of labels (`producer.labelled_csv`), preceded by the id, which only the tables contain.
KEYS = ("image_id", "source", *(name for name in PATH_COLUMNS if name not in {"source", "name", "id"}), "name", "id")
MAX_ROWS = 1_000_000
EXAMPLES = 10
TIMEOUT_S = 600.0
WITH_IMAGES = ("predictions", "features")

UNKNOWN = "the tables contain no such image"
AMBIGUOUS = "several images have this name: give their image_id"
DIFFERENT = "rows give one image different labels"

# A source normalised as `labels_csv` does: composed Unicode, forward slashes, no leading `./`.
SOURCE = r"regexp_replace(replace(nfc_normalize(source), '\', '/'), '^\./', '')"
KEY_OF = dict.fromkeys(KEYS, SOURCE) | {"image_id": "image_id", "id": "image_id", "name": f"parse_filename({SOURCE})"}


@dataclass(frozen=True)
class Labelled:
    """The result of adding labels.

    Attributes:
        added: images whose label was added.
        unchanged: images that already had this label.
        superseded: images whose label from the same file was corrected later; the correction is kept.
        left_out: reason → number of rows that were not used.
        examples: reason → names of some of them.
    """

    added: int
    unchanged: int
    superseded: int
    left_out: dict[str, int]
    examples: dict[str, list[str]]


def add_labels(settings: Settings, csv: Path, by: str) -> Labelled:
    """Add the labels of a CSV with the columns label and image_id, source or name; see `add_label_rows`.

    Raises:
        ServiceError: the CSV cannot be used, or no table contains images yet.
    """
    return add_label_rows(settings, read_labels(csv, KEYS, MAX_ROWS), by)


def add_label_rows(settings: Settings, rows: LabelRows, by: str) -> Labelled:
    """Append labels in one commit. Adding the same rows again has no effect, even if they were corrected later.

    Args:
        by: author of the labels, recorded with them.

    Raises:
        ServiceError: no table contains images yet.
    """
    left_out, examples = dict(rows.dropped), {why: [one] for why, one in rows.examples.items()}
    labels = _resolve(rows, _images(settings, rows), left_out, examples)
    table = Table(settings.place.tables, "labels")
    current = _current(settings, list(labels))
    new = {image: label for image, label in labels.items() if current.get(image) != label}
    now = datetime.now(UTC)
    appended = table.append(
        pa.table(
            {
                "image_id": pa.array(list(new), pa.string()),
                "label": pa.array(list(new.values()), pa.string()),
                "labelled_at": pa.array([now] * len(new), LABELS.field("labelled_at").type),
                "by": pa.array([by] * len(new), pa.string()),
            }
        ),
        f"labels:{_fingerprint(labels)}",
        0,
    )
    added = len(new) if appended else 0
    return Labelled(added, len(labels) - len(new), len(new) - added, left_out, examples)


def _images(settings: Settings, rows: LabelRows) -> dict[str, list[str]]:
    """Return name in the CSV → ids of the images of that name, at most two of them."""
    there = [name for name in WITH_IMAGES if settings.place.has_table(name)]
    if not there:
        raise NotFoundError(f"no images yet in {settings.place.tables}: run `imagestream stream` or `train` first")
    images = " UNION ".join(f"SELECT image_id, {KEY_OF[rows.key]} AS key FROM {name}" for name in there)  # noqa: S608
    found = query(
        settings,
        f"SELECT key, list_slice(list(DISTINCT image_id), 1, 2) AS ids FROM ({images}) "  # noqa: S608
        "WHERE key IN (SELECT unnest($keys::VARCHAR[])) GROUP BY key",
        parameters={"keys": list(rows.labels)},
        timeout_s=TIMEOUT_S,
    )
    return dict(zip(found.column("key").to_pylist(), found.column("ids").to_pylist(), strict=True))


def _resolve(
    rows: LabelRows, images: Mapping[str, list[str]], left_out: dict[str, int], examples: dict[str, list[str]]
) -> dict[str, str]:
    """Return image id → label; rows that cannot be used are added to `left_out`."""

    def leave_out(why: str, name: str) -> None:
        left_out[why] = left_out.get(why, 0) + 1
        shown = examples.setdefault(why, [])
        if len(shown) < EXAMPLES:
            shown.append(name)

    labels: dict[str, str] = {}
    different: set[str] = set()
    for name, label in rows.labels.items():
        ids = images.get(name, [])
        if len(ids) != 1:
            leave_out(AMBIGUOUS if ids else UNKNOWN, name)
        elif labels.setdefault(ids[0], label) != label:  # two names of one image
            leave_out(DIFFERENT, name)
            different.add(ids[0])
    return {image: label for image, label in labels.items() if image not in different}


def _current(settings: Settings, images: list[str]) -> dict[str, str]:
    """Return the latest label in the table `labels` of each image."""
    found = query(
        settings,
        f"FROM ({LATEST_LABELS}) WHERE image_id IN (SELECT unnest($ids::VARCHAR[]))",
        parameters={"ids": images},
        timeout_s=TIMEOUT_S,
    )
    return dict(zip(found.column("image_id").to_pylist(), found.column("label").to_pylist(), strict=True))


def _fingerprint(labels: Mapping[str, str]) -> str:
    digest = hashlib.sha256()
    for image, label in sorted(labels.items()):
        digest.update(f"{image}\0{label}\0".encode())
    return digest.hexdigest()
