"""What the dashboard changes: a message is published, a label given, an alias moved, as the commands do it."""

import hashlib
import time
from datetime import UTC, datetime

import pyarrow as pa

from models.errors import ModelError
from models.scorer import check_golden, load_scorer
from producer.class_names import CONTROL_CHARACTER, MAX_LABEL_CHARS, class_name
from producer.message import MAX_MESSAGE_BYTES, build_message
from streaming.dashboard.context import Dashboard
from streaming.dashboard.pictures import Wanted
from streaming.errors import DataError
from streaming.pipeline.positions import committed_offsets
from streaming.registry import open_registry
from streaming.settings import Settings
from streaming.storage.registry_objects import Alias, Move
from streaming.storage.tables import LABELS, Table

BY = "dashboard"


def publish(dashboard: Dashboard, data: bytes, name: str, label: str | None = None) -> Wanted:
    """Publish an image to the topic; where it is there, once the broker has acknowledged it.

    Raises:
        ServiceError: it is too large, the label says nothing, or no broker takes it.
    """
    if len(data) > MAX_MESSAGE_BYTES:
        raise DataError(f"{name} has {len(data):,} bytes, at most {MAX_MESSAGE_BYTES:,} are taken")
    source = f"{BY}/{name}"
    placed = dashboard.post(build_message(data, source, label=checked_label(label) if label else None))
    topic, _ = committed_offsets(dashboard.settings)  # as the tables name it
    return Wanted(topic, placed.partition, placed.offset, hashlib.sha256(data).hexdigest(), source)


def checked_label(label: str) -> str:
    """A label as the table `labels` takes it.

    Raises:
        ServiceError: it is empty, is too long or has control characters.
    """
    name = class_name(label) or ""
    if not 0 < len(name) <= MAX_LABEL_CHARS or CONTROL_CHARACTER.search(name):
        raise DataError(f"expected a label of 1 to {MAX_LABEL_CHARS} printed characters, got {label[:50]!r}")
    return name


def give_label(settings: Settings, image_id: str, label: str) -> None:
    """Append a label to the table `labels`, where the latest of an image counts.

    Raises:
        ServiceError: the label says nothing.
    """
    row = {"image_id": image_id, "label": checked_label(label), "labelled_at": datetime.now(UTC), "by": BY}
    # Given by hand, the same label may come again after another one: each time is an append of its own.
    Table(settings.place.tables, "labels").append(
        pa.Table.from_pylist([row], schema=LABELS), "labels-by-hand", time.time_ns()
    )


def promote(settings: Settings, version: int, alias: Alias, why: str) -> Move:
    """Point an alias at a version that computes what it should; a running stream follows.

    Raises:
        ServiceError: there is no such version, or its bundle is refused.
    """
    registry = open_registry(settings.home)
    try:
        bundle = registry.read(version)
        check_golden(bundle, load_scorer(bundle))
        return registry.promote(version, alias=alias, by=BY, why=why or "promoted by hand")
    except ModelError as error:
        raise DataError(str(error)) from error


def roll_back(settings: Settings, alias: Alias) -> Move:
    """Point an alias back at the version before.

    Raises:
        ServiceError: there is none.
    """
    try:
        return open_registry(settings.home).rollback(alias=alias, by=BY)
    except ModelError as error:
        raise DataError(str(error)) from error
