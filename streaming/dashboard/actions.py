"""Actions of the dashboard: publish an image, label it, promote or roll back a model, as the commands do."""

import hashlib
import time
from datetime import UTC, datetime

import pyarrow as pa

from models.errors import ModelError
from models.scorer import check_golden, load_scorer
from producer.class_names import CONTROL_CHARACTER, MAX_LABEL_CHARS, class_name
from producer.message import MAX_MESSAGE_BYTES, build_message
from streaming.dashboard.context import Dashboard
from streaming.dashboard.pictures import ImageRef
from streaming.errors import DataError
from streaming.pipeline.positions import committed_offsets
from streaming.registry import open_registry
from streaming.settings import Settings
from streaming.storage.registry_objects import Alias, Move
from streaming.storage.tables import LABELS, Table

BY = "dashboard"


def publish(dashboard: Dashboard, data: bytes, name: str, label: str | None = None) -> ImageRef:
    """Publish an image to the topic, wait for the broker's acknowledgement, and return the message's position.

    Args:
        name: file name, recorded as the image's source.

    Raises:
        ServiceError: the image is too large, the label is invalid, or the broker does not accept the message.
    """
    if len(data) > MAX_MESSAGE_BYTES:
        raise DataError(f"{name} has {len(data):,} bytes: expected at most {MAX_MESSAGE_BYTES:,}")
    source = f"{BY}/{name}"
    placed = dashboard.post(build_message(data, source, label=checked_label(label) if label else None))
    topic, _ = committed_offsets(dashboard.settings)  # as the tables name it
    return ImageRef(topic, placed.partition, placed.offset, hashlib.sha256(data).hexdigest(), source)


def checked_label(label: str) -> str:
    """Return a label in its normalised form; raises ServiceError if it is empty, too long or has control characters."""
    name = class_name(label) or ""
    if not 0 < len(name) <= MAX_LABEL_CHARS or CONTROL_CHARACTER.search(name):
        raise DataError(f"expected a label of 1 to {MAX_LABEL_CHARS} printable characters, got {label[:50]!r}")
    return name


def add_label(settings: Settings, image_id: str, label: str) -> None:
    """Append a label to the table `labels`, in which the latest label of an image takes precedence.

    Raises:
        ServiceError: the label is invalid.
    """
    row = {"image_id": image_id, "label": checked_label(label), "labelled_at": datetime.now(UTC), "by": BY}
    # The same label may be given again after another one, so each append has its own transaction id.
    Table(settings.place.tables, "labels").append(
        pa.Table.from_pylist([row], schema=LABELS), "labels-by-hand", time.time_ns()
    )


def promote(settings: Settings, version: int, alias: Alias, why: str) -> Move:
    """Move an alias to a version after checking its golden predictions; a running stream follows.

    Args:
        why: reason recorded in the alias's history; may be empty.

    Raises:
        ServiceError: the version does not exist or its bundle is invalid.
    """
    registry = open_registry(settings.home)
    try:
        bundle = registry.read(version)
        check_golden(bundle, load_scorer(bundle))
        return registry.promote(version, alias=alias, by=BY, why=why or "promoted by hand")
    except ModelError as error:
        raise DataError(str(error)) from error


def roll_back(settings: Settings, alias: Alias) -> Move:
    """Move an alias back to its previous version; raises ServiceError if there is no previous version."""
    try:
        return open_registry(settings.home).rollback(alias=alias, by=BY)
    except ModelError as error:
        raise DataError(str(error)) from error
