"""Keeping the tables in shape beside a running stream: few files, a short log, no leftovers.

First, batches that were decided and never finished are finished, by the decisions of each stream. Then per table:
compact small files, write a checkpoint of the log and drop what of it has expired, vacuum files that no version within
the retention names. Then old decisions of whole batches are deleted.

None of it gets in the way of the stream. Compaction replaces files and adds no rows, so an append never conflicts with
it, and a compaction that lost a race with a replay is tried again or left to the next run. Application transactions
live in the log and its checkpoints, so that a batch that is applied again is still recognised. A reader keeps the files
that it opened until the retention has passed.

What is vacuumed is older than the retention, also where no commit ever named it. The files of a batch are named only by
its decision, after all of it was scored, and those of a training run hours after they were written: so the retention is
never less than MIN_RETENTION_HOURS.
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
from streaming.storage.home import LOG, TABLES, Home
from streaming.storage.table_features import files_with_vectors, reader_features
from streaming.storage.table_log import answers, open_delta

RETENTION_HOURS = 168
MIN_RETENTION_HOURS = 24
LOG_RETENTION = "delta.logRetentionDuration"  # Delta's own default is 30 days
COMMITS_PER_CHECKPOINT = 10

# Files grow with their table, so that few are enough: about FILES.
FILES = 32
MIN_FILE_BYTES = 64 * 1024**2
MAX_FILE_BYTES = 512 * 1024**2


@dataclass(frozen=True)
class TableMaintenance:
    """What was done to one table."""

    name: str
    files_before: int
    files_after: int
    bytes_after: int
    vacuumed: int  # files removed from the directory
    retention_hours: int
    skipped: str | None = None  # why compaction is left to the next run


@dataclass(frozen=True)
class MaintenanceReport:
    """What one run did."""

    tables: list[TableMaintenance]
    decisions_removed: int
    seconds: float


def maintain(settings: Settings, *, retention_hours: int = RETENTION_HOURS) -> MaintenanceReport:
    """Finish decided batches; compact, checkpoint and vacuum every table of the home; delete old decisions.

    Args:
        retention_hours: how long files stay that the table no longer names; raised where that would not be safe.

    Raises:
        ServiceError: there are no tables, one cannot be read, or a decided batch cannot be finished.
    """
    clock = perf_counter()
    home = settings.place
    names = home.table_names()
    if not names:
        raise NotFoundError(f"no tables yet in {settings.place.tables}: run `imagestream stream` first")
    store = home.store
    tables_of_streams, whole = Tables(home.tables), {}
    for stream in store.folders("streams"):
        if positions := finish_decided(settings, stream, tables_of_streams):
            whole[stream] = positions.number
    tables = []
    for name in names:
        try:
            tables.append(_maintain_table(home, name, max(retention_hours, MIN_RETENTION_HOURS)))
        except DeltaError as error:
            raise ServiceError(f"table {name} cannot be maintained: {error}") from error
    removed = sum(Decisions(store, stream).prune(number) for stream, number in whole.items())
    return MaintenanceReport(tables, removed, perf_counter() - clock)


def _maintain_table(home: Home, name: str, retention_hours: int) -> TableMaintenance:
    place = home.table(name)
    before = _sizes(place)
    skipped = compact(place, min(max(sum(before) // FILES, MIN_FILE_BYTES), MAX_FILE_BYTES))
    table = open_delta(place)
    with answers(place):
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
    """Drop what of the log is older than the files that it names: no reader can go back there.

    Every commit lists the log, so that a stream with many micro-batches per minute gets slower as it grows.
    """
    kept = f"interval {retention_hours} hours"
    # deltalake would add a feature that other readers may not know to a table that has some.
    if not reader_features(table) and table.metadata().configuration.get(LOG_RETENTION) != kept:
        with suppress(CommitFailedError):  # somebody was quicker: the next run tries again
            table.alter.set_table_properties({LOG_RETENTION: kept})
    table.cleanup_metadata()


def _last_checkpoint(home: Home, name: str) -> int:
    try:
        return int(json.loads(home.store.get(f"{TABLES}/{name}/{LOG}/_last_checkpoint") or b"")["version"])
    except (ValueError, KeyError):  # none yet
        return -1


def _vacuum(table: DeltaTable, retention_hours: int) -> list[str]:
    """Remove files that are no part of the table, and older than the retention; returns their names."""
    # Full: also what no commit ever named, the files of attempts that failed. A deletion vector would be taken for one.
    full = not files_with_vectors(table)

    def vacuum(dry_run: bool) -> list[str]:
        return table.vacuum(
            retention_hours=retention_hours,
            dry_run=dry_run,
            enforce_retention_duration=False,  # it is enforced here, with more in view
            full=full,
        )

    return vacuum(dry_run=False) if vacuum(dry_run=True) else []  # one that removes nothing would still make commits
