"""Replay: publishes quarantined messages again, unchanged, and marks them with `replayed_at`.

For each file of the table:

    1. send   the unmarked rows, a few at a time, to the topics that they came from
    2. wait   until the broker has acknowledged all of them
    3. mark   them, by replacing the file with a copy in which they have a `replayed_at`, in one commit

A row is marked only after its acknowledgement, so no message is lost if the replay is killed; the next replay sends the
rows of the current file again (at-least-once delivery). Marked rows are not sent again unless requested.

The stream can continue in the meantime: it only adds files, which never conflicts. If maintenance has replaced the same
files, marking detects this and is repeated (`streaming/jobs/rewrite.py`). Only a few megabytes of rows, and the
messages in flight, are in memory.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
from deltalake.transaction import AddAction

from models.decode import Reason
from streaming.errors import ConflictError, NotFoundError
from streaming.jobs.resend import Identity, Resender
from streaming.jobs.rewrite import replace_files, write_copy
from streaming.platform.kafka_security import client_arguments
from streaming.query import query
from streaming.settings import Settings
from streaming.storage.files import local_copy, read_batches
from streaming.storage.home import make_dir, try_lock
from streaming.storage.table_log import LiveFile, open_log
from streaming.wording import counted

MARK_ATTEMPTS = 20
REPLAY_COLUMNS = [
    *("topic", "partition", "offset", "image_id", "source", "label_true", "reason", "value", "replayed_at"),
    *("key", "headers", "timestamp_ms"),  # missing in files of earlier releases
]
NOT_KEPT = Reason.MESSAGE_BOMB  # the bytes of these messages were not stored


@dataclass(frozen=True)
class ReplayOptions:
    """The rows to replay.

    Attributes:
        reason: of the quarantine; by default any.
        again: whether to include rows that have been replayed before.
    """

    reason: str | None = None
    limit: int | None = None
    again: bool = False


@dataclass
class ReplayReport:
    """The result of a replay."""

    wanted: int  # requested rows
    sent: int = 0  # acknowledged and marked
    bytes: int = 0
    by_reason: dict[str, int] = field(default_factory=dict)  # reason → sent rows
    refused: int = 0  # rows larger than the broker accepts; they stay unmarked
    failed: str | None = None  # why it stopped early

    @property
    def complete(self) -> bool:
        """Whether all requested rows were sent."""
        return self.failed is None and self.sent == self.wanted


def count_selected(settings: Settings, options: ReplayOptions) -> dict[str, int]:
    """Reason → rows that a replay would send, regardless of `limit`; raises ServiceError if there is no quarantine."""
    if not settings.place.has_table("quarantine"):
        raise NotFoundError(f"no quarantine in {settings.place.tables}: run `imagestream stream` first")
    sql = """
        SELECT reason, count(*) AS n FROM quarantine
        WHERE reason <> $not_kept AND ($again OR replayed_at IS NULL) AND ($reason::VARCHAR IS NULL OR reason = $reason)
        GROUP BY reason ORDER BY n DESC, reason
    """
    rows = query(
        settings, sql, parameters={"again": options.again, "reason": options.reason, "not_kept": NOT_KEPT}
    ).to_pylist()
    return {row["reason"]: row["n"] for row in rows}


def replay(
    settings: Settings,
    bootstrap_servers: str,
    options: ReplayOptions,
    on_progress: Callable[[ReplayReport], None] = lambda _: None,
) -> ReplayReport:
    """Publish quarantined messages again, each to its original topic, and mark them; report progress after each file.

    Raises:
        ServiceError: there is no quarantine, another replay is running, or no broker answers; nothing was sent then.
    """
    wanted = sum(count_selected(settings, options).values())
    report = ReplayReport(wanted if options.limit is None else min(wanted, options.limit))
    with try_lock(
        make_dir(settings.work_dir) / "replay.lock",
        f"another replay is running in {settings.home}: wait until it has ended",
    ):
        log = open_log(settings.place.table("quarantine"))
        log.check_rewritable()  # since marking rewrites files
        files = [file.path for file in log.files()]
        sender = Resender(bootstrap_servers, client_arguments(settings))
        try:
            for file in files:
                left = report.wanted - report.sent - report.refused
                if left <= 0 or report.failed:
                    break
                _replay_file(settings, file, options, left, sender, report)
                on_progress(report)
        finally:
            sender.close()
    return report


def _replay_file(
    settings: Settings, file: str, options: ReplayOptions, left: int, sender: Resender, report: ReplayReport
) -> None:
    """Send at most `left` wanted rows of one file, and mark the acknowledged ones, even if it is interrupted."""
    try:
        for row in _wanted_rows(settings.place.table("quarantine"), file, options, left):
            if sender.failed:
                break
            sender.send(row)
    finally:
        sender.flush()
        sent, sender.acknowledged = sender.acknowledged, []
        report.refused, report.failed = sender.refused, sender.failed
        mark_replayed(settings, {one.identity for one in sent}, datetime.now(UTC), likely=file)
        for one in sent:
            report.sent += 1
            report.bytes += one.bytes
            report.by_reason[one.reason] = report.by_reason.get(one.reason, 0) + 1


def _wanted_rows(place: str, file: str, options: ReplayOptions, left: int) -> Iterator[dict[str, Any]]:
    with local_copy(place, file) as copy:
        for batch in read_batches(copy, REPLAY_COLUMNS):
            for row in batch.to_pylist():
                unmarked = options.again or row["replayed_at"] is None
                if left and unmarked and options.reason in {None, row["reason"]} and row["reason"] != NOT_KEPT:
                    left -= 1
                    yield row


def mark_replayed(settings: Settings, identities: set[Identity], at: datetime, likely: str) -> None:
    """Set `replayed_at` of rows, in one commit.

    Args:
        identities: topic, partition and offset of the rows.
        likely: the file in which they were last; if maintenance has merged it with others, all files are searched.

    Raises:
        ServiceError: other jobs replaced files of the table at every attempt.
    """
    for _ in range(MARK_ATTEMPTS if identities else 0):
        if _replace_files(settings.place.table("quarantine"), identities, at, likely):
            return
    if identities:
        raise ConflictError(
            f"{counted(len(identities), 'message')} sent but not marked as replayed, since other jobs replaced files "
            f"of the quarantine {MARK_ATTEMPTS} times: stop them before the next replay, which sends these messages "
            "again"
        )


def _replace_files(place: str, identities: set[Identity], at: datetime, likely: str) -> bool:
    """Try to mark rows; False if another program replaced files in the meantime."""
    log = open_log(place)
    number = log.next_rewrite()
    schema = log.data_schema()
    left = len(identities)
    removes: list[LiveFile] = []
    adds: list[AddAction] = []
    for file in sorted(log.files(), key=lambda one: one.path != likely):
        with local_copy(place, file.path) as copy:
            batches = read_batches(copy, ["topic", "partition", "offset"])
            marks = sum(len(_positions(batch, identities)) for batch in batches)
        if marks:
            removes.append(file)
            adds.append(write_copy(place, [file], schema, lambda rows: _marked(rows, identities, at)))
            left -= marks
        if left <= 0:
            break
    return replace_files(log, number, removes, adds, data_change=True)


def _positions(rows: pa.RecordBatch | pa.Table, identities: set[Identity]) -> list[int]:
    columns = (rows.column(name).to_pylist() for name in ("topic", "partition", "offset"))
    return [number for number, identity in enumerate(zip(*columns, strict=True)) if identity in identities]


def _marked(rows: pa.Table, identities: set[Identity], at: datetime) -> pa.Table:
    values = rows.column("replayed_at").to_pylist()
    for position in _positions(rows, identities):
        values[position] = at
    place = rows.schema.get_field_index("replayed_at")
    field = rows.schema.field(place)
    return rows.set_column(place, field, pa.array(values, field.type))
