"""The columns of scored and quarantined messages, built with Arrow."""

import hashlib
from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from models.arrays import Features
from models.decode import BadImage
from models.scorer import Head
from producer.message import MessageHeaders
from streaming.storage.files import list_array
from streaming.storage.tables import ANSWER, FEATURES, IDENTITY, LINEAGE, QUARANTINE

TOP_K = 3
MAX_KEY_BYTES = 1024  # longer keys are truncated, except in `quarantine`
MAX_ID_CHARS = 256
# Valid timestamps in milliseconds, 1971 to 2200; the lower limit excludes timestamps in seconds.
FIRST_MS, LAST_MS = 365 * 86_400_000, 7_258_118_400_000
NOT_UTF_8 = "\ufffd"


def identity_columns(
    batch: pa.RecordBatch, headers: list[MessageHeaders], hashes: pa.Array, topics: Mapping[str, str]
) -> pa.RecordBatch:
    """The identity columns of messages.

    The image id is the `ce_id`, or the SHA-256 of the bytes if there is no usable one. The key is the producer's;
    images of the same camera or tenant may share one.
    """
    millis = _milliseconds(batch)
    is_time = pc.and_(pc.greater_equal(millis, FIRST_MS), pc.less(millis, LAST_MS))
    times = pc.if_else(is_time, millis, pa.scalar(None, pa.int64())).cast(pa.timestamp("ms", "UTC"))
    columns = [
        pc.coalesce(pa.array([_usable_id(one.id) for one in headers], pa.string()), hashes),
        _named(batch.column("topic"), topics),
        batch.column("partition"),
        batch.column("offset"),
        times,
        pa.array([one.source for one in headers], pa.string()),
        pa.array([one.label for one in headers], pa.string()),
        pc.binary_slice(batch.column("key"), 0, MAX_KEY_BYTES),
        millis,
    ]
    columns = [column.cast(want.type) for column, want in zip(columns, IDENTITY, strict=True)]
    return pa.RecordBatch.from_arrays(columns, schema=pa.schema(IDENTITY))


def _milliseconds(batch: pa.RecordBatch) -> pa.Array:
    """Kafka's timestamps in milliseconds; Spark returns them in microseconds."""
    if "timestamp_ms" in batch.schema.names:
        return batch.column("timestamp_ms")
    microseconds = batch.column("timestamp").cast(pa.int64())
    rounded = np.floor_divide(microseconds.fill_null(0).to_numpy(), 1000)  # Arrow's division rounds towards zero
    return pc.if_else(microseconds.is_valid(), pa.array(rounded, pa.int64()), pa.scalar(None, pa.int64()))


def _usable_id(given: str | None) -> str | None:
    """A `ce_id`; None if it was truncated or is not UTF-8, since it would not be unique."""
    return given if given and len(given) <= MAX_ID_CHARS and NOT_UTF_8 not in given else None


def _named(topic: pa.Array, topics: Mapping[str, str]) -> pa.Array:
    """Topics by their names in the tables."""
    encoded = topic.dictionary_encode()
    names = pa.array([topics.get(name, name) for name in encoded.dictionary.to_pylist()], pa.string())
    return names.take(encoded.indices)


def sha256_of(value: pa.Scalar) -> str:
    return hashlib.sha256(value.as_buffer() or b"").hexdigest()


def quarantined_rows(
    batch: pa.RecordBatch,
    identity: pa.Table,
    without_headers: Collection[int],
    bad: dict[int, BadImage],
    lineage: tuple[int, str, str, int],
) -> pa.Table:
    rows = sorted(bad)
    n = len(rows)
    now = datetime.now(UTC)

    def as_sent(name: str) -> pa.ChunkedArray:
        column = batch.column(name)
        return pa.chunked_array([column.slice(row, 1) for row in rows])  # slices, so that large values are not copied

    headers, values = batch.column("headers"), as_sent("value")
    columns = {
        **{name: identity.column(name).take(rows) for name in identity.column_names},
        **{name.name: [value] * n for name, value in zip(LINEAGE, lineage, strict=True)},
        "quarantined_at": [now] * n,
        "stage": [str(bad[row].stage) for row in rows],
        "reason": [str(bad[row].reason) for row in rows],
        "detail": [bad[row].detail for row in rows],
        "value": values,
        "value_sha256": [sha256_of(value) for value in values],
        "replayed_at": [None] * n,
        "key": as_sent("key"),
        "headers": [None if row in without_headers else headers[row].as_py() for row in rows],
    }
    return pa.table([_column(columns[name.name], name.type) for name in QUARANTINE], schema=QUARANTINE)


def _column(values: Any, kind: pa.DataType) -> Any:
    return values.cast(kind) if isinstance(values, pa.Array | pa.ChunkedArray) else pa.array(values, kind)


def feature_rows(rows: pa.Table, features: Features, backbone_sha256: str, hashes: pa.Array) -> pa.Table:
    n = len(features)
    columns = [
        *rows.columns,
        pa.repeat(backbone_sha256, n),
        pa.nulls(n, pa.string()),
        list_array(features),
        pa.nulls(n, pa.int32()),
        hashes,
    ]
    return pa.table(columns, schema=FEATURES)


def answer_columns(probabilities: Features, head: Head) -> list[pa.Array]:
    """The columns of `ANSWER`: the label, its probability, the `TOP_K` most probable labels, and the current time.

    A model with a decision threshold may predict the less probable of two labels.

    Args:
        probabilities: (N, C) float32.
        head: of the model, with its C classes.
    """
    n = len(probabilities)
    order, best = most_probable(probabilities, TOP_K)
    answers = head.answers(probabilities)
    names = pa.array(head.classes, pa.string())
    pairs = pa.StructArray.from_arrays(
        [names.take(pa.array(order.reshape(-1))), pa.array(best.reshape(-1))], fields=list(ANSWER[2].type.value_type)
    )
    k = order.shape[1]
    offsets = pa.array(np.arange(0, (n + 1) * k, k, dtype=np.int32))
    return [
        names.take(pa.array(answers)),
        pa.array(probabilities[np.arange(n), answers]),
        pa.ListArray.from_arrays(offsets, pairs).cast(ANSWER[2].type),
        pa.repeat(pa.scalar(datetime.now(UTC), ANSWER[3].type), n),
    ]


def most_probable(probabilities: Features, k: int) -> tuple[NDArray[np.intp], Features]:
    """The `k` most probable classes of each row, or all if there are fewer, in descending order of probability.

    Args:
        probabilities: (N, C) float32.

    Returns:
        (N, k) class indices and (N, k) probabilities.
    """
    order = np.argsort(-probabilities, axis=1, kind="stable")[:, :k]
    return order, np.take_along_axis(probabilities, order, axis=1)
