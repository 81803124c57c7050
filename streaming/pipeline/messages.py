"""The messages of an Arrow batch before decoding: headers limited, envelopes removed, unreadable ones rejected."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from models.decode import BadImage, Reason, Stage
from producer.message import MessageHeaders, read_headers
from streaming.pipeline.payload import FrameError, Payload, frame_of, unwrapper

MAX_HEADERS, MAX_HEADERS_BYTES = 1_000, 1024**2  # per message


class MessageValues(Sequence[bytes | None]):
    """The messages' bytes. Each is converted to Python only while it is used, since it may be as large as 20 MB."""

    def __init__(self, column: pa.Array, hidden: Collection[int] = ()) -> None:
        self.column = column
        self._hidden = hidden  # rows that are read as None

    def __len__(self) -> int:
        return len(self.column)

    def __getitem__(self, row: Any) -> Any:
        return None if row in self._hidden else self.column[row].as_py()


@dataclass(frozen=True)
class BoundedHeaders:
    """The headers of messages.

    Attributes:
        read: one per message; empty for a message with too many headers.
        without: the rows of messages with too many headers.
        refused: row → reason, of messages that are not decoded.
    """

    read: list[MessageHeaders]
    without: frozenset[int]
    refused: dict[int, BadImage]


def bounded_headers(column: pa.ListArray) -> BoundedHeaders:
    """The headers of each message, converted to Python only if their number and size are within the limits."""
    entries = column.values
    sizes = [pc.binary_length(entries.field(name)).fill_null(0).to_numpy() for name in ("key", "value")]
    before = np.concatenate([[0], np.cumsum(sizes[0].astype(np.int64) + sizes[1])])
    ends = column.offsets.to_numpy()
    counts, total = np.diff(ends), np.diff(before[ends])
    refused = {
        int(row): BadImage(
            Stage.READ,
            Reason.TOO_MANY_HEADERS,
            f"expected at most {MAX_HEADERS:,} headers and {MAX_HEADERS_BYTES:,} bytes in total, got {counts[row]:,} "
            f"headers of {total[row]:,} bytes",
        )
        for row in np.flatnonzero((counts > MAX_HEADERS) | (total > MAX_HEADERS_BYTES))
    }
    if not refused:
        return BoundedHeaders([read_headers(one) for one in column.to_pylist()], frozenset(), refused)
    return BoundedHeaders(
        [read_headers(None if row in refused else column[row].as_py()) for row in range(len(column))],
        frozenset(refused),
        refused,
    )


def without_envelopes(column: pa.Array, payload: Payload, refused: dict[int, BadImage]) -> pa.Array:
    """The images without their envelopes; messages that are not in the envelope are added to `refused`."""
    unwrap = unwrapper(payload)
    if unwrap is None:
        return column
    images: list[bytes | None] = []
    for row, value in enumerate(column):
        data = value.as_py()
        try:
            images.append(None if data is None or row in refused else unwrap(data))
        except FrameError as error:
            refused[row] = BadImage(Stage.READ, Reason.WRONG_FRAME, str(error))
            images.append(None)
    return pa.array(images, pa.binary())


def with_envelopes_named(values: MessageValues, bad: dict[int, BadImage]) -> dict[int, BadImage]:
    """The bad images, with the envelope added to the detail of those that seem to be in one."""
    named = {
        row: replace(image, detail=f"{image.detail}; it is {frame}")
        for row, image in bad.items()
        if image.reason == Reason.NOT_AN_IMAGE and (frame := frame_of(values[row] or b""))
    }
    return {**bad, **named}


def unreadable(batch: pa.RecordBatch, refused: Mapping[tuple[str, int, int], str]) -> Iterator[tuple[int, BadImage]]:
    places = zip(*(batch.column(name).to_pylist() for name in ("topic", "partition", "offset")), strict=True)
    for row, place in enumerate(places):
        if place in refused:
            yield row, BadImage(Stage.READ, Reason.MESSAGE_BOMB, refused[place])
