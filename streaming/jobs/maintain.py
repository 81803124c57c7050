"""Table maintenance: compaction, log cleanup and vacuum, which can run while a stream is running.

First, decided batches of all streams are completed. Then, for each table: compact small files, write a checkpoint of
the log and delete its expired entries, and vacuum files that no version within the retention refers to. Finally, old
decisions of complete batches are deleted.

None of this disturbs the stream. Compaction replaces files without adding rows, so an append never conflicts with it; a
compaction that lost a race with a replay is retried or left to the next run. Application transactions are kept in the
log and its checkpoints, so a batch that is applied again is still recognised. A reader can use the files that it has
opened until the retention has passed.

Vacuum also deletes files older than the retention that no commit ever referred to. The files of a batch are referred to
only after the whole batch has been scored, and those of a training run hours after they were written, so the
retention is at least MIN_RETENTION_HOURS.
"""

import json
from contextlib import suppress
from dataclasses import dataclass
from time import perf_counter

import pyarrow as pa
from deltalake import DeltaTable
from deltalake.exceptions import CommitFailedError, DeltaError

from streaming.errors import NotFoundError, ServiceError
from streaming.jobs.rewrite import compact
from streaming.pipeline.decisions import Decisions
from streaming.pipeline.finish import Tables, finish_decided
from streaming.settings import Settings
from streaming.storage.home import LOG, TABLES_FOLDER, Home
from streaming.storage.table_features import files_with_vectors, reader_features
from streaming.storage.table_log import open_delta, store_errors_in_one_line

RETENTION_HOURS = 168
MIN_RETENTION_HOURS = 24
LOG_RETENTION = "delta.logRetentionDuration"  # Delta's own default is 30 days
COMMITS_PER_CHECKPOINT = 10

# The target size of files grows with the table, so that it has about FILES files.
FILES = 32
MIN_FILE_BYTES = 64 * 1024**2
MAX_FILE_BYTES = 512 * 1024**2


@dataclass(frozen=True)
class TableMaintenance:
    """The maintenance of one table."""

    name: str
    files_before: int
    files_after: int
    bytes_after: int
    vacuumed: int  # files deleted from the directory
    retention_hours: int
    skipped: str | None = None  # why compaction was left to the next run


@dataclass(frozen=True)
class MaintenanceReport:
    """The result of one run."""

    tables: list[TableMaintenance]
    decisions_removed: int
    seconds: float


def maintain(settings: Settings, *, retention_hours: int = RETENTION_HOURS) -> MaintenanceReport:
    """Complete decided batches; compact, checkpoint and vacuum every table of the home; delete old decisions.

    Args:
        retention_hours: how long to keep files that a table no longer refers to; at least MIN_RETENTION_HOURS.

    Raises:
        ServiceError: there are no tables, one cannot be read, or a decided batch cannot be completed.
    """
    clock = perf_counter()
    home = settings.place
    names = home.table_names()
    if not names:
        raise NotFoundError(f"no tables yet in {settings.place.tables}: run `imagestream stream` first")
    store = home.store
    tables_of_streams, complete = Tables(home.tables), {}
    for stream in store.folders("streams"):
        if positions := finish_decided(settings, stream, tables_of_streams):
            complete[stream] = positions.number
    tables = []
    for name in names:
        try:
            tables.append(_maintain_table(home, name, max(retention_hours, MIN_RETENTION_HOURS)))
        except DeltaError as error:
            raise ServiceError(f"table {name} cannot be maintained: {error}") from error
    removed = sum(Decisions(store, stream).prune(number) for stream, number in complete.items())
    return MaintenanceReport(tables, removed, perf_counter() - clock)


def _maintain_table(home: Home, name: str, retention_hours: int) -> TableMaintenance:
    place = home.table(name)
    before = _sizes(place)
    skipped = compact(place, min(max(sum(before) // FILES, MIN_FILE_BYTES), MAX_FILE_BYTES))
    table = open_delta(place)
    with store_errors_in_one_line(place):
        if table.version() - _last_checkpoint(home, name) >= COMMITS_PER_CHECKPOINT:
            table.create_checkpoint()
        _shorten_log(table, retention_hours)
        vacuumed = _vacuum(table, retention_hours)
    after = _sizes(place)
    return TableMaintenance(name, len(before), len(after), sum(after), len(vacuumed), retention_hours, skipped)


def _sizes(place: str) -> list[int]:
    sizes: list[int] = pa.table(open_delta(place).get_add_actions(flatten=True)).column("size_bytes").to_pylist()
    return sizes


def _shorten_log(table: DeltaTable, retention_hours: int) -> None:
    """Delete log entries that are older than the retention of files, since no reader can use them.

    deltalake lists the log for a commit, so a long log slows down streams with many micro-batches per minute.
    """
    kept = f"interval {retention_hours} hours"
    # If the table has features, deltalake would add one that other readers may not support.
    if not reader_features(table) and table.metadata().configuration.get(LOG_RETENTION) != kept:
        with suppress(CommitFailedError):  # another writer was first; the next run tries again
            table.alter.set_table_properties({LOG_RETENTION: kept})
    table.cleanup_metadata()


def _last_checkpoint(home: Home, name: str) -> int:
    try:
        return int(json.loads(home.store.get(f"{TABLES_FOLDER}/{name}/{LOG}/_last_checkpoint") or b"")["version"])
    except (ValueError, KeyError):  # none yet
        return -1


def _vacuum(table: DeltaTable, retention_hours: int) -> list[str]:
    """Delete files that are not part of the table and older than the retention, and return their names."""
    # A full vacuum includes files of failed attempts, which no commit refers to, but would also delete deletion
    # vectors.
    full = not files_with_vectors(table)

    def vacuum(dry_run: bool) -> list[str]:
        return table.vacuum(
            retention_hours=retention_hours,
            dry_run=dry_run,
            enforce_retention_duration=False,  # MIN_RETENTION_HOURS is enforced instead
            full=full,
        )

    return vacuum(dry_run=False) if vacuum(dry_run=True) else []  # a vacuum without deletions would still commit
