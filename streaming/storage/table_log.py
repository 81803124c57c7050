"""Commits to a Delta table by creating the next entry of its log with one conditional put.

deltalake lists and reads the log before and after each commit, which takes 10 ms locally and eight consecutive requests
to a bucket. A writer that knows the newest version, and that its own transaction is not in it, needs none of that: if
the next entry can be created, no other writer has committed in the meantime, so there are no conflicts to check. If it
cannot be created, the writer refreshes its state and tries again.

This requires protocol (1, 2) and recent state. If another program has upgraded the table, its entries may need more
than is written here, so deltalake makes the commit or rejects it. And an old entry may have been cleaned from the log,
so that its number seems to be free.

Source: Delta's protocol, "Actions" and "Delta Log Entries" (github.com/delta-io/delta/blob/master/PROTOCOL.md).
"""

import json
import random
import time
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import date, datetime
from typing import Any
from urllib.parse import quote, unquote

import pyarrow as pa
from deltalake import CommitProperties, DeltaTable, PostCommitHookProperties, Transaction
from deltalake.exceptions import CommitFailedError, DeltaError
from deltalake.transaction import AddAction, RemoveAction

from streaming.errors import DamagedError, DataError, ServiceError
from streaming.storage.bucket_store import CONNECT_TIMEOUT_S, REQUEST_TIMEOUT_S, allows_http
from streaming.storage.store import check_key, is_uri, open_store
from streaming.storage.store_errors import STORE_ERROR, store_error
from streaming.storage.table_features import check_commit_error, check_features, check_no_deleted_rows, check_rewritable

PROTOCOL = (1, 2)  # versions of reader and writer: no table features, but appendOnly and invariants
CHECKPOINT_INTERVAL = 50  # versions
REWRITE = "rewrite"  # the application id of all jobs that replace files; see streaming/jobs/rewrite.py
COMMIT_TRIES = 50
PAUSE_S = (0.005, 0.5)  # the maximum pause after the second failure and after many
# The maximum age of the cached state of a log. `maintain` keeps log entries for at least an hour.
KNOWN_FOR_S = 600.0
BUCKET_OPTIONS = {
    "timeout": f"{REQUEST_TIMEOUT_S}s",
    "connect_timeout": f"{CONNECT_TIMEOUT_S}s",
    "max_retries": "3",
    "retry_timeout": f"{REQUEST_TIMEOUT_S}s",
}
# Log cleanup lists the whole log, so `maintain` does it instead of every commit.
HOOKS = PostCommitHookProperties(create_checkpoint=True, cleanup_expired_logs=False)


@dataclass(frozen=True)
class LiveFile:
    """A file of a table's current version.

    Attributes:
        path: relative to the table, not percent-encoded.
        modified: milliseconds since 1970, by the clock of the writer.
        partition: partition column → value.
    """

    path: str
    bytes: int
    modified: int
    partition: Mapping[str, str | None]


class TableLog:
    """The log of one table: an open handle, and cached state of the newest version."""

    def __init__(self, handle: DeltaTable, place: str, opened_at: float) -> None:
        """Start from an open table.

        Args:
            handle: of the table, opened after `opened_at`.
            place: a path or a URI.
            opened_at: a time of `boot_seconds`.

        Raises:
            TableFeatureError: the table uses a feature that is not supported.
        """
        self.place = place
        self._handle = handle
        self._store = open_store(place)
        self._transactions: dict[str, int | None] = {}  # application id → its newest transaction in `_version`
        self._read_state(opened_at)

    def _read_state(self, known_at: float) -> None:
        check_features(self._handle, self.place)
        protocol = self._handle.protocol()
        append_only = self._handle.metadata().configuration.get("delta.appendOnly", "false")
        self._by_hand = (protocol.min_reader_version, protocol.min_writer_version) == PROTOCOL and append_only != "true"
        self._version = self._handle.version()
        self._transactions = {}
        self._known_at = known_at

    def refresh(self) -> DeltaTable:
        """A handle of the newest version of the table."""
        now = boot_seconds()
        if self._handle.version() == self._version and self._is_newest():
            self._known_at = now
            return self._handle
        with store_errors_in_one_line(self.place):
            self._handle.update_incremental()
        self._read_state(now)
        return self._handle

    def _is_newest(self) -> bool:
        """Whether the known version is still the newest one.

        This checks for the next log entry; updating the handle would take 0.1 ms for each file of the table.
        """
        return not self._is_old() and self._store.size(_entry_key(self._version + 1)) is None

    def _is_old(self) -> bool:
        return boot_seconds() - self._known_at > KNOWN_FOR_S

    def transaction(self, app_id: str) -> int | None:
        """The newest transaction of an application, up to date."""
        now = boot_seconds()
        if self._is_newest():
            self._known_at = now
        else:
            self.refresh()
        return self.known_transaction(app_id)

    def known_transaction(self, app_id: str) -> int | None:
        """The newest transaction of an application in the known version, which is at most ten minutes old."""
        if self._is_old():
            self.refresh()
        if app_id not in self._transactions:
            with store_errors_in_one_line(self.place):  # this reads the log
                self._transactions[app_id] = self._handle.transaction_version(app_id)
        return self._transactions[app_id]

    def has(self, app_id: str, number: int) -> bool:
        """Whether transaction `number` of the application, or a later one, is in the known version."""
        last = self.known_transaction(app_id)
        return last is not None and last >= number

    def next_rewrite(self) -> int:
        """The transaction number of the next replacement of files of the known version."""
        last = self.known_transaction(REWRITE)
        return 1 if last is None else last + 1

    def check_rewritable(self) -> None:
        """Raise a TableFeatureError if files of the known version must not be replaced."""
        with store_errors_in_one_line(self.place):
            check_rewritable(self._handle, self.place)

    def data_schema(self) -> pa.Schema:
        """The columns in the files: all except the partition columns, whose values are in the folders' names."""
        partition = self._handle.metadata().partition_columns
        return pa.schema([field for field in pa.schema(self._handle.schema()) if field.name not in partition])

    def commit(self, adds: Sequence[AddAction], app_id: str, number: int, removes: Sequence[RemoveAction] = ()) -> bool:
        """Add and remove files in one entry, with transaction `number` of the application.

        Returns:
            Whether the entry was written; False if the log has that transaction or a later one, or if a file to be
            removed is no longer part of the table.

        Raises:
            CommitFailedError: another writer was first at every attempt.
        """
        for attempt in range(COMMIT_TRIES):
            if attempt > 1:  # jitter, so that concurrent writers do not stay in lockstep
                first, longest = PAUSE_S
                time.sleep(random.uniform(0, min(first * 2.0 ** (attempt - 2), longest)))  # noqa: S311  not a secret
            if attempt or removes:
                self.refresh()
            if self.has(app_id, number) or not {one.path for one in removes} <= self._live_paths(removes):
                return False
            commit_next = self._create_entry if self._by_hand else self._commit_with_deltalake
            if commit_next([*removes, *adds], app_id, number):
                return True
        raise CommitFailedError(f"another writer committed to {self.place} first, {COMMIT_TRIES} times in a row")

    def _create_entry(self, actions: Sequence[AddAction | RemoveAction], app_id: str, number: int) -> bool:
        """Create the entry of the next version; False if it already exists."""
        version, now = self._version + 1, boot_seconds()
        if not self._store.create(_entry_key(version), _entry(actions, app_id, number)):
            return False
        if self._is_old():
            # The process was suspended in between, and the log may have been cleaned up to and including this entry.
            return self.has(app_id, number)
        self._version, self._known_at = version, now
        self._transactions[app_id] = number
        if version % CHECKPOINT_INTERVAL == 0:
            _CHECKPOINTS.submit(_write_checkpoint, self.place)
        return True

    def _commit_with_deltalake(self, actions: Sequence[AddAction | RemoveAction], app_id: str, number: int) -> bool:
        """Commit with any protocol that deltalake supports; False if there was a conflict."""
        try:
            with store_errors_in_one_line(self.place):
                self._handle.create_write_transaction(
                    [*actions],
                    "append",
                    self._handle.schema(),
                    commit_properties=CommitProperties(app_transactions=[Transaction(app_id, number)]),
                    post_commithook_properties=HOOKS,
                )
        except CommitFailedError as error:
            check_commit_error(error, self.place)
            return False
        self._known_at = float("-inf")  # the handle does not include its own commit
        return True

    def files(self) -> list[LiveFile]:
        """The files of the known version, in no particular order.

        Raises:
            ServiceError: the log names a file outside the table's directory.
            TableFeatureError: the files do not hold exactly the table's rows.
        """
        with store_errors_in_one_line(self.place):
            check_no_deleted_rows(self._handle, self.place)
        rows = pa.table(self._handle.get_add_actions()).to_pylist()
        return [
            LiveFile(
                _inside(self.place, unquote(row["path"])),
                row["size_bytes"],
                row["modification_time"],
                {name: _partition_value(value) for name, value in (row.get("partition") or {}).items()},
            )
            for row in rows
        ]

    def _live_paths(self, wanted: Collection[RemoveAction]) -> set[str]:
        if not wanted:
            return set()
        self.check_rewritable()
        return {unquote(path) for path in pa.table(self._handle.get_add_actions()).column("path").to_pylist()}


def open_delta(place: str, version: int | None = None) -> DeltaTable:
    """Open an existing table.

    Args:
        place: a path, or a URI, whose credentials come from the environment.
        version: by default the newest.

    Raises:
        StoreAwayError: the bucket does not answer; other errors are deltalake's own.
    """
    with store_errors_in_one_line(place):
        return DeltaTable(place, version=version, storage_options=storage_options(place))


def storage_options(place: str) -> dict[str, str] | None:
    """deltalake's options for the store of a table: timeouts and retries; None for a local table."""
    if not is_uri(place):
        return None
    http = {"allow_http": "true"} if allows_http(place.partition("://")[0]) else {}
    return {**BUCKET_OPTIONS, **http}


@contextmanager
def store_errors_in_one_line(place: str) -> Iterator[None]:
    """Convert deltalake's errors about a bucket to one-line errors; see `store_error`."""
    try:
        yield
    except Exception as error:  # deltalake raises OSError, DeltaError and plain Exception
        if is_uri(place) and STORE_ERROR.search(str(error)):
            raise store_error(place, error) from None
        raise


def _write_checkpoint(place: str) -> None:
    """Write a checkpoint of a table. It reads all entries since the last one, in a bucket with 50 consecutive requests.

    If it fails, `maintain` or a commit 50 versions later writes the next one.
    """
    with suppress(ServiceError, DeltaError, OSError), store_errors_in_one_line(place):
        open_delta(place).create_checkpoint()


_CHECKPOINTS = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")


def open_log(place: str) -> TableLog:
    """The log of an existing table, in its newest version."""
    now = boot_seconds()
    return TableLog(open_delta(place), place, now)


def _entry_key(version: int) -> str:
    return f"_delta_log/{version:020}.json"


def _entry(actions: Sequence[AddAction | RemoveAction], app_id: str, number: int) -> bytes:
    """A log entry as JSON lines; its random `txnId` distinguishes it from those of other writers."""
    now = int(time.time() * 1000)
    appends = all(isinstance(action, AddAction) for action in actions)
    info = {
        "timestamp": now,
        "operation": "WRITE" if appends else "OPTIMIZE",
        "operationParameters": {"mode": "Append"} if appends else {},
        "isBlindAppend": appends,
        "engineInfo": "imagestream",
        "txnId": str(uuid.uuid4()),
    }
    once = {"appId": app_id, "version": number, "lastUpdated": now}
    lines = [{"commitInfo": info}, {"txn": once}, *map(_as_json, actions)]
    return "\n".join(json.dumps(line) for line in lines).encode()


def _as_json(action: AddAction | RemoveAction) -> dict[str, Any]:
    path = quote(action.path, safe="/=")  # Delta's protocol requires URL encoding
    if isinstance(action, AddAction):
        return {
            "add": {
                "path": path,
                "partitionValues": dict(action.partition_values),
                "size": action.size,
                "modificationTime": action.modification_time,
                "dataChange": action.data_change,
                "stats": action.stats,
            }
        }
    return {
        "remove": {
            "path": path,
            "deletionTimestamp": action.deletion_timestamp,
            "dataChange": action.data_change,
            "extendedFileMetadata": True,
            "partitionValues": action.partition_values or {},
            "size": action.size,
        }
    }


def _inside(place: str, path: str) -> str:
    try:
        return check_key(path)
    except ServiceError as error:
        raise DamagedError(
            f"the log of {place} names {path!r}, which is outside the table: restore the table from a copy"
        ) from error


def _partition_value(value: Any) -> str | None:
    """The value of a partition column in the log's text form."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool | datetime) or not isinstance(value, int | date):
        raise DataError(f"expected a partition by text, date or integer, got {type(value).__name__} {value!r}")
    return str(value)


def boot_seconds() -> float:
    """A monotonic clock in seconds that also runs while the machine is suspended, if the system has one."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))
