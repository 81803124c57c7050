"""Keeping the tables in shape beside a running stream: few files, a short log, no leftovers.

Per table: compact small files, write a checkpoint of the log and drop what of it has expired, vacuum files that no
version within the retention names. Then the pins of batches that are whole.

None of it gets in the way of the stream. Compaction replaces files and adds no rows, so an append never conflicts with
it, and a compaction that lost a race with a replay is tried again or left to the next run. Application transactions
live in the log and its checkpoints, so that a retried batch is still recognised. A reader keeps the files that it
opened until the retention has passed.

What is vacuumed is older than the retention, also where no commit ever named it. A worker's file is named only when
its batch commits; so the retention is never shorter than the oldest unfinished batch is old, and never less than
`MIN_RETENTION_HOURS`. A batch that begins now writes files that are younger.
"""

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from math import ceil
from pathlib import Path
from time import perf_counter

from deltalake import DeltaTable
from deltalake.exceptions import CommitFailedError, DeltaError

from streaming.errors import ServiceError
from streaming.jobs.rewrite import compact
from streaming.query import query
from streaming.settings import Settings

RETENTION_HOURS = 168
MIN_RETENTION_HOURS = {"features": 24}  # a training run writes features for hours before it commits them
MIN_RETENTION_HOURS_ELSE = 1
LOG_RETENTION = "delta.logRetentionDuration"  # Delta's own default is 30 days
PINS_KEPT = 100
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
    pins_removed: int
    seconds: float


def maintain(settings: Settings, *, retention_hours: int = RETENTION_HOURS) -> MaintenanceReport:
    """Compact, checkpoint and vacuum every table of the home, and remove old pins.

    Args:
        retention_hours: how long files stay that the table no longer names; raised where that would not be safe.

    Raises:
        ServiceError: there are no tables, or one cannot be read.
    """
    clock = perf_counter()
    directories = sorted(log.parent for log in settings.tables_dir.glob("*/_delta_log"))
    if not directories:
        raise ServiceError(f"no tables yet in {settings.tables_dir}: run `imagestream stream` first")
    unfinished_hours, removable = _look_at_pins(settings)
    tables = []
    for directory in directories:
        least = MIN_RETENTION_HOURS.get(directory.name, MIN_RETENTION_HOURS_ELSE)
        try:
            tables.append(_maintain_table(directory, max(retention_hours, least, unfinished_hours)))
        except DeltaError as error:
            raise ServiceError(f"table {directory.name} cannot be maintained: {error}") from error
    for path in removable:
        path.unlink(missing_ok=True)
    return MaintenanceReport(tables, len(removable), perf_counter() - clock)


def _maintain_table(directory: Path, retention_hours: int) -> TableMaintenance:
    before = len(DeltaTable(directory).file_uris())
    skipped = _compact(directory)
    table = DeltaTable(directory)
    if table.version() - _last_checkpoint(directory) >= COMMITS_PER_CHECKPOINT:
        table.create_checkpoint()
    _shorten_log(table, retention_hours)
    vacuumed = _vacuum(table, retention_hours)
    sizes = DeltaTable(directory).get_add_actions(flatten=True)["size_bytes"].to_pylist()
    return TableMaintenance(directory.name, before, len(sizes), sum(sizes), len(vacuumed), retention_hours, skipped)


def _compact(directory: Path) -> str | None:
    """Merge small files; returns why not all of them were, if so."""
    sizes = DeltaTable(directory).get_add_actions(flatten=True)["size_bytes"].to_pylist()
    return compact(directory, min(max(sum(sizes) // FILES, MIN_FILE_BYTES), MAX_FILE_BYTES))


def _shorten_log(table: DeltaTable, retention_hours: int) -> None:
    """Drop what of the log is older than the files that it names: no reader can go back there.

    Every commit lists the log, so that a stream with many micro-batches per minute gets slower as it grows.
    """
    kept = f"interval {retention_hours} hours"
    if table.metadata().configuration.get(LOG_RETENTION) != kept:
        with suppress(CommitFailedError):  # somebody was quicker: the next run tries again
            table.alter.set_table_properties({LOG_RETENTION: kept})
    table.cleanup_metadata()


def _last_checkpoint(directory: Path) -> int:
    try:
        return int(json.loads((directory / "_delta_log" / "_last_checkpoint").read_text())["version"])
    except (OSError, ValueError, KeyError):  # none yet
        return -1


def _vacuum(table: DeltaTable, retention_hours: int) -> list[str]:
    """Remove files that are no part of the table, and older than the retention; returns their names."""

    def vacuum(dry_run: bool) -> list[str]:
        return table.vacuum(
            retention_hours=retention_hours,
            dry_run=dry_run,
            enforce_retention_duration=False,  # it is enforced here, with more in view
            full=True,  # also what no commit ever named: the files of attempts that failed
        )

    return vacuum(dry_run=False) if vacuum(dry_run=True) else []  # one that removes nothing would still make commits


def _look_at_pins(settings: Settings) -> tuple[int, list[Path]]:
    """(hours that the retention must have on account of unfinished batches, pins that nobody needs any more)."""
    unfinished_hours, removable = 0, []
    for directory in settings.checkpoints_dir.glob("*/pins"):
        query_id = _query_id(directory.parent / "spark")
        pins = sorted(_pins(directory), key=lambda pin: pin.batch_id)
        whole = _whole_batches(settings, pins[0].batch_id) if pins else set()
        for pin in pins:
            over = query_id is not None and pin.query_id != query_id  # its checkpoint is gone, another has taken over
            if not over and (pin.query_id, pin.batch_id) not in whole:
                unfinished_hours = max(unfinished_hours, ceil(pin.age_hours) + 1)
            elif pin in pins[:-PINS_KEPT]:
                removable.append(pin.path)
    return unfinished_hours, removable


@dataclass(frozen=True)
class _Pin:
    path: Path
    query_id: str
    batch_id: int
    age_hours: float


def _pins(directory: Path) -> Iterator[_Pin]:
    now = datetime.now(UTC)
    for path in directory.glob("*.json"):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            age = now - datetime.fromisoformat(content["pinned_at"])
            yield _Pin(path, content["query_id"], int(content["batch_id"]), age.total_seconds() / 3600)
        except FileNotFoundError:  # removed by another run
            continue
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ServiceError(f"the pin {path} is damaged ({error}): which files are needed is not known") from error


def _query_id(checkpoint: Path) -> str | None:
    try:
        return str(json.loads((checkpoint / "metadata").read_text(encoding="utf-8"))["id"])
    except (OSError, ValueError, KeyError):  # lost, or not yet made
        return None


def _whole_batches(settings: Settings, first: int) -> set[tuple[str, int]]:
    """(query id, batch id) in `batches`, from batch `first` on."""
    if not (settings.tables_dir / "batches" / "_delta_log").is_dir():
        return set()
    sql = "SELECT query_id, batch_id FROM batches WHERE batch_id >= $first"
    return {(row["query_id"], row["batch_id"]) for row in query(settings, sql, parameters={"first": first}).to_pylist()}
