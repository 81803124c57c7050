"""Completes decided batches: commits the files of a decision to the tables, from the decision alone.

The driver that decided a batch applies it at once. Every start of the stream, `imagestream maintain` and a driver that
lost a decision apply all batches that were decided but are not complete. However many processes apply a decision, each
table gets its files once: the log entry carries the transaction (stream id, batch number) and is only written if the
table has not seen that number or a later one. The answers topic, if there is one, is protected likewise by a Kafka
transaction (`streaming/pipeline/answers_topic.py`). `batches` comes last: a batch with a row there is complete.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa

from streaming.errors import ConfigurationError, DamagedError
from streaming.pipeline.answers_topic import AnswersTopic
from streaming.pipeline.decisions import DECIDED_TABLES, Decision, Decisions, OffsetRange, files_of
from streaming.pipeline.positions import Positions, read_identity, read_positions
from streaming.settings import Settings
from streaming.storage.tables import BATCHES, Table

LISTED = 3  # the maximum number of files that an error names


class Tables:
    """The tables that the stream writes; each is opened, or created, when it is first used."""

    def __init__(self, place: str | Path) -> None:
        self.place = str(place)
        self._open: dict[str, Table] = {}

    def __getitem__(self, name: str) -> Table:
        if name not in self._open:
            self._open[name] = Table(self.place, name)
        return self._open[name]

    def transactions(self, stream: str) -> dict[str, int | None]:
        """The newest batch number that the stream has committed to each table of a decision.

        The tables are opened and read in parallel, since each takes several requests in a bucket.
        """
        with ThreadPoolExecutor(len(DECIDED_TABLES)) as pool:
            return dict(
                zip(DECIDED_TABLES, pool.map(lambda name: self[name].transaction(stream), DECIDED_TABLES), strict=True)
            )


def apply(
    decision: Decision,
    tables: Tables,
    *,
    fresh: bool,
    answers: AnswersTopic | None = None,
    on_step: Callable[[str], None] = lambda _: None,
    seconds: Callable[[], Mapping[str, float]] | None = None,
) -> bool:
    """Complete a decided batch.

    Args:
        fresh: whether this process has just decided the batch, so that its files need no check.
        answers: sends the answers; required if the decision has any.
        on_step: called with the name of each table when it has its files, and, from another thread, with "send" and
            "answers"; see `AnswersTopic.send`.
        seconds: returns the timings for the row of the batch; by default those of the decision.

    Returns:
        Whether the newest batch of the stream is this one. False if the stream has moved past it; nothing is done then.

    Raises:
        ServiceError: files of the decision are missing or damaged, or its answers cannot be sent.
        AnswersAwayError: the broker of the answers topic does not answer.
    """
    app, number = decision.stream, decision.number
    # Checked for each batch: a driver that was suspended for a day must not add rows after its decision was pruned.
    # Decisions are kept for much longer than the cached state of a table in a bucket.
    batches = tables["batches"]
    last = batches.recent_transaction(app) if fresh else batches.transaction(app)
    if last is not None and last >= number:
        return last == number
    if not fresh:
        _check_files(decision, tables)
    files = {tables[name]: of_table for name, of_table in files_of(decision).items()}
    if decision.answers is not None and answers is None:
        raise ConfigurationError(
            f"batch {number} has answers for topic {decision.answers.topic!r}, but no sender was given"
        )
    with ThreadPoolExecutor(1 + len(files)) as pool:  # tables and answers are independent of each other
        sent = pool.submit(answers.send, decision, tables.place, on_step) if decision.answers and answers else None
        commits = {
            table.name: pool.submit(table.append_files, of_table, app, number) for table, of_table in files.items()
        }
        for name in DECIDED_TABLES:
            if name in commits:
                commits[name].result()
            on_step(name)
        if sent is not None:
            sent.result()
    row = _batch_row(decision, decision.figures.seconds if seconds is None else seconds())
    batches.append(row, app, number)
    return True


def finish_decided(
    settings: Settings, stream: str, tables: Tables, answers: AnswersTopic | None = None
) -> Positions | None:
    """Complete every decided batch; return the stream's positions afterwards, None before its first start.

    Args:
        stream: the stream's name.
        answers: kept open by the caller; by default, one is opened and closed here.

    Raises:
        ServiceError: a decision is damaged, does not continue the previous batch, or lacks files; tables, `batches` and
            decisions are not from the same copy of the home; or answers cannot be sent.
        AnswersAwayError: the broker of the answers topic does not answer.
    """
    if answers is None:
        with closing(AnswersTopic(settings)) as own:
            return finish_decided(settings, stream, tables, own)
    identity = read_identity(settings, stream)
    if identity is None:
        return None
    decisions = Decisions(settings.place.store, stream)
    positions = read_positions(settings, identity)
    while True:
        decision = decisions.read(positions.number + 1)
        if decision is not None:
            _check_continues(positions, decision, stream)
            apply(decision, tables, fresh=False, answers=answers)
            positions = positions.after(decision)
            continue
        ahead = [name for name, last in tables.transactions(identity.id).items() if (last or 0) > positions.number]
        if not ahead:
            return positions
        if decisions.read(positions.number + 1) is None:  # otherwise another driver has decided it meanwhile
            raise DamagedError(
                f"table {ahead[0]} has rows of stream {stream!r} after batch {positions.number}, the newest in table "
                "batches, but there is no decision for them: parts of the home were restored from different copies; "
                "restore tables and streams from one copy"
            )


def _check_continues(positions: Positions, decision: Decision, stream: str) -> None:
    number = decision.number
    if decision.stream != positions.stream:
        raise DamagedError(
            f"batch {number} of stream {stream!r} was decided under another stream id: restore streams/{stream} and "
            "tables from one copy"
        )
    left_out = {(one.topic, one.partition): one for one in decision.left_out}
    for one in decision.ranges:
        place = (one.topic, one.partition)
        before = left_out.get(place, OffsetRange(*place, one.start, one.start))
        end = positions.ends.get(place, before.start)
        if (before.start, before.end) != (end, one.start):
            raise DamagedError(
                f"batch {number} of stream {stream!r} was decided from offset {one.start} of {one.topic!r} partition "
                f"{one.partition}, but the batch before it ends at {end}: restore streams/{stream} and tables from one "
                "copy"
            )


def _check_files(decision: Decision, tables: Tables) -> None:
    """Check that all files that are not committed yet exist and have the right size."""
    wrong = []
    last = tables.transactions(decision.stream)
    for name, files in files_of(decision).items():
        if (last[name] or 0) >= decision.number:
            continue
        for file in files:
            size = tables[name].store.size(file.path)
            if size != file.bytes:
                found = "missing" if size is None else f"{size:,} bytes instead of {file.bytes:,}"
                wrong.append(f"{name}/{file.path} ({found})")
    if wrong:
        more = f" and {len(wrong) - LISTED} more" if len(wrong) > LISTED else ""
        raise DamagedError(
            f"batch {decision.number} was decided, but files of it are missing or damaged: "
            f"{', '.join(wrong[:LISTED])}{more}; restore them into the home's tables"
        )


def _batch_row(decision: Decision, seconds: Mapping[str, float]) -> pa.Table:
    figures = decision.figures
    row: dict[str, Any] = {
        "model_version": decision.model.version,
        "bundle_sha256": decision.model.sha256,
        "query_id": decision.stream,
        "batch_id": decision.number,
        "challenger_version": decision.challenger.version if decision.challenger else None,
        "offsets": [asdict(one) for one in decision.ranges],
        "left_out": [asdict(one) for one in decision.left_out] or None,
        "topics": list(decision.topics.items()),
        "input_rows": decision.input_rows,
        "predicted_rows": figures.predicted_rows,
        "quarantined_rows": sum(figures.quarantined.values()),
        "input_bytes": figures.input_bytes,
        "seconds": list(seconds.items()),
        "refused": figures.refused,
        "drift": list(figures.drift.items()) or None,
        "started_at": figures.started_at,
        "committed_at": datetime.now(UTC),
    }
    return pa.Table.from_pylist([row], schema=BATCHES)
