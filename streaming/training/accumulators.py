"""Sums over all rows from which PCA is fitted; their size is that of the model, not of the data.

Every partition accumulates its rows and emits its sums in pieces of bounded size. Workers merge matching pieces in the
order of the partitions, so the driver receives one set of sums, and the same rows in the same partitions give bitwise
identical sums, regardless of the order in which tasks finish.
"""

from collections.abc import Callable, Iterator
from itertools import groupby
from operator import itemgetter
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from pyspark import TaskContext
from pyspark.sql import DataFrame

from models.arrays import Features
from models.projection import GramSums, merged_means
from models.randomized_pca import RangeSketch
from streaming.errors import DataError, reported
from streaming.storage.files import as_matrix

BLOCK_BYTES = 8 * 1024**2  # of features per matrix product: with few rows, a product is memory-bound
PIECE_BYTES = 16 * 1024**2
PIECE = pa.schema(
    [
        pa.field("piece", pa.int32()),  # number of the piece
        pa.field("part", pa.int32()),  # number of the partition
        pa.field("first", pa.int32()),  # index of the piece's first row in the matrix
        pa.field("n", pa.int64()),
        pa.field("squares", pa.float64()),
        pa.field("mean", pa.binary()),
        pa.field("matrix", pa.binary()),
    ]
)
PIECE_DDL = "piece int, part int, first int, n long, squares double, mean binary, matrix binary"

Sums = TypeVar("Sums", GramSums, RangeSketch)


def gram_sums(rows: DataFrame) -> GramSums:
    """Return row count, mean and scatter matrix of the column `features` (array<float>), 8·D² bytes on the driver.

    Raises:
        ServiceError: there are no rows.
    """
    return _summed(rows, GramSums)


def range_sketch(rows: DataFrame, size: int, seed: int) -> RangeSketch:
    """Return the sketch of a randomized PCA of the column `features`, `size` columns: 16·D·`size` bytes on the driver.

    Raises:
        ServiceError: there are no rows.
    """
    return _summed(rows, lambda width: RangeSketch(width, size, seed))


def _summed(rows: DataFrame, start: Callable[[int], Sums]) -> Sums:
    piece_bytes = PIECE_BYTES

    def sum_partition(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        sums: Any = None
        for block in _blocks(batches):
            sums = start(block.shape[1]) if sums is None else sums
            sums.add(block)
        if sums is not None:
            context = TaskContext.get()
            yield from _in_pieces(sums, context.partitionId() if context else 0, piece_bytes)

    pieces = rows.select("features").mapInArrow(reported(sum_partition), PIECE_DDL)
    cores = rows.sparkSession.sparkContext.defaultParallelism  # the session's shuffle partitions may be hundreds
    ordered = pieces.repartition(cores, "piece").sortWithinPartitions("piece", "part")
    merged = ordered.mapInArrow(lambda batches: _merge(batches, start), PIECE_DDL).toArrow()
    if not merged.num_rows:
        raise DataError("there are no features to fit on")
    return _assembled(sorted(merged.to_pylist(), key=itemgetter("piece")), start)


def _blocks(batches: Iterator[pa.RecordBatch]) -> Iterator[Features]:
    """Yield the rows of small batches in blocks of about `BLOCK_BYTES`."""
    gathered: list[Features] = []
    for batch in batches:
        if batch.num_rows:
            gathered.append(as_matrix(batch.column("features")))
            if sum(part.nbytes for part in gathered) >= BLOCK_BYTES:
                yield np.concatenate(gathered)
                gathered = []
    if gathered:
        yield np.concatenate(gathered)


def _matrix(sums: Any) -> Any:
    return sums.scatter if isinstance(sums, GramSums) else sums.sketch


def _in_pieces(sums: Any, part: int, piece_bytes: int) -> Iterator[pa.RecordBatch]:
    matrix = _matrix(sums)
    step = max(1, piece_bytes // matrix[0].nbytes)
    for piece, first in enumerate(range(0, len(matrix), step)):
        yield _batch(piece, part, first, sums.n, getattr(sums, "squares", 0.0), sums.mean, matrix[first : first + step])


def _batch(piece: int, part: int, first: int, n: int, squares: float, mean: Any, matrix: Any) -> pa.RecordBatch:
    values = (piece, part, first, n, squares, mean.tobytes(), matrix.tobytes())
    return pa.RecordBatch.from_pydict({name: [value] for name, value in zip(PIECE.names, values, strict=True)}, PIECE)


def _merge(batches: Iterator[pa.RecordBatch], start: Callable[[int], Sums]) -> Iterator[pa.RecordBatch]:
    """Merge pieces of the same number; they arrive sorted by number and partition."""
    rows = (row for batch in batches for row in batch.to_pylist())
    directions: Any = None
    for piece, parts in groupby(rows, key=itemgetter("piece")):
        first, n, squares = 0, 0, 0.0
        mean: Any = None
        matrix: Any = None
        for part in parts:
            more, other = np.frombuffer(part["matrix"]), np.frombuffer(part["mean"])
            if mean is None:
                first, n, squares, mean, matrix = part["first"], part["n"], part["squares"], other, more.copy()
                continue
            if len(other) != len(mean):
                raise DataError("expected features of one width, got different widths in different partitions")
            n, mean, between = merged_means(n, mean, part["n"], other)
            squares += part["squares"] + float(between @ between)
            if directions is None:
                directions = getattr(start(len(mean)), "directions", ())
            right = between @ directions if len(directions) else between
            left = between[first : first + len(matrix) // len(right)]
            matrix += more
            matrix += np.outer(left, right).reshape(-1)
        yield _batch(piece, 0, first, n, squares, mean, matrix)


def _assembled(pieces: list[dict[str, Any]], start: Callable[[int], Sums]) -> Sums:
    first = pieces[0]
    sums = start(len(first["mean"]) // 8)
    sums.n = first["n"]
    sums.mean[:] = np.frombuffer(first["mean"])
    if isinstance(sums, RangeSketch):
        sums.squares = first["squares"]
    flat, position = _matrix(sums).reshape(-1), 0
    for piece in pieces:
        numbers = np.frombuffer(piece["matrix"])
        flat[position : position + len(numbers)] = numbers
        position += len(numbers)
    return sums
