"""Replaces files of a table: small files by a merged one, or a file by a copy in which some rows are changed.

A replacement is one commit that removes and adds files. Rewriters exclude each other without a lock: each commit
carries the next transaction of the application `rewrite`, counted from the version whose files were read, so that of
two rewriters that read the same version the second is rejected. A commit also fails if a file to be removed is no
longer part of the table, as after a DELETE by another program. Concurrent appends do not conflict and are never lost.

Rows are copied a few megabytes at a time, regardless of the size of the files.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa
from deltalake.transaction import AddAction, RemoveAction

from streaming.errors import DamagedError
from streaming.storage.files import FileSink, conformed, local_copy, read_batches
from streaming.storage.table_features import TableFeatureError
from streaming.storage.table_log import REWRITE, LiveFile, TableLog, open_log
from streaming.storage.tables import STATISTICS, added, merged_statistics, statistics

ATTEMPTS = 3
ROW_GROUP_BYTES = 32 * 1024**2  # of rows in memory
MAX_ROWS_READ = 64 * 1024


def compact(place: str, target_bytes: int) -> str | None:
    """Merge the small files of each partition of a table into files of at most `target_bytes`.

    Files are merged only if the sum of their sizes stays below the target; large files are not rewritten.

    Returns:
        Why compaction is incomplete: other rewriters were first at every attempt, or the table cannot be rewritten.
        None if it is complete.
    """
    for _ in range(ATTEMPTS):
        try:
            log = open_log(place)
            log.check_rewritable()
        except TableFeatureError as error:
            return str(error)
        number = log.next_rewrite()
        schema = log.data_schema()
        for group in _groups(log.files(), target_bytes):
            merged = write_copy(place, group, schema)
            if not replace_files(log, number, group, [merged], data_change=False):
                break
            number += 1
        else:
            return None
    return f"another job rewrote the table at the same time, {ATTEMPTS} times"


def _groups(files: Sequence[LiveFile], target_bytes: int) -> Iterator[list[LiveFile]]:
    """Groups of at least two files of one partition with at most the target size in total, smallest files first."""
    partitions: dict[tuple[Any, ...], list[LiveFile]] = {}
    for file in sorted(files, key=lambda one: (one.bytes, one.path)):
        partitions.setdefault(tuple(file.partition.items()), []).append(file)
    for of_partition in partitions.values():
        group: list[LiveFile] = []
        left = target_bytes
        for file in of_partition:
            if file.bytes > left:
                if len(group) > 1:
                    yield group
                group, left = [], target_bytes
            group.append(file)
            left -= file.bytes
        if len(group) > 1:
            yield group


def replace_files(
    log: TableLog, number: int, removes: Sequence[LiveFile], adds: Sequence[AddAction], *, data_change: bool
) -> bool:
    """Replace files by others in one commit.

    Args:
        number: `log.next_rewrite()` of the version that `removes` are from.
        data_change: False if the rows are the same as before.

    Returns:
        False if another rewriter was first; nothing is committed then, and the new files are vacuumed later.
    """
    now_ms = int(time.time() * 1000)
    gone = [
        RemoveAction(
            file.path,
            data_change=data_change,
            deletion_timestamp=now_ms,
            size=file.bytes,
            partition_values=dict(file.partition),
        )
        for file in removes
    ]
    return log.commit([replace(add, data_change=data_change) for add in adds], REWRITE, number, gone)


def write_copy(
    place: str, files: Sequence[LiveFile], schema: pa.Schema, change: Callable[[pa.Table], pa.Table] = lambda rows: rows
) -> AddAction:
    """Write a new file with the rows of files of one partition, next to the first of them; return its log action.

    Args:
        place: of the table, a path or a URI.
        files: of one partition.
        change: called with some of the rows at a time; returns the rows to write.

    Raises:
        ServiceError: a file cannot be read, or there are no rows to write.
    """
    folder = files[0].path.rpartition("/")[0]
    names = STATISTICS.get(place.rpartition("/")[2], schema.names)
    parts: list[Mapping[str, Any]] = []
    with FileSink(f"{place}/{folder}".rstrip("/"), schema) as sink:
        for rows in _row_groups(place, [file.path for file in files], schema):
            changed = change(rows)
            sink.write(changed)
            parts.append(statistics(changed, names))
        written = sink.close()
    if written is None:
        raise DamagedError(f"{place}/{files[0].path} should have rows, but has none")
    path, stats = f"{folder}/{written.path}".lstrip("/"), json.dumps(merged_statistics(parts))
    return added(replace(written, path=path, partition=dict(files[0].partition), stats=stats))


def _row_groups(place: str, paths: Sequence[str], schema: pa.Schema) -> Iterator[pa.Table]:
    """The rows of files in order, a few megabytes at a time, so that small files are merged into larger row groups."""
    waiting: list[pa.Table] = []
    waiting_bytes = 0
    for path in paths:
        try:
            with local_copy(place, path) as file:
                for batch in read_batches(file, max_rows=MAX_ROWS_READ):
                    waiting.append(pa.Table.from_batches([conformed(batch, schema)]))
                    waiting_bytes += waiting[-1].nbytes
                    if waiting_bytes >= ROW_GROUP_BYTES:
                        yield pa.concat_tables(waiting)
                        waiting, waiting_bytes = [], 0
        except (OSError, pa.ArrowException) as error:
            raise DamagedError(f"{place}/{path} cannot be read: {str(error).splitlines()[0]}; restore it") from error
    if waiting:
        yield pa.concat_tables(waiting)
