"""Reads the tables as Arrow tables, for notebooks and scripts: `from streaming import predictions`.

No JVM is started. Each function reads the current tables, or those of an earlier time. Convert a result to pandas with
`.to_pandas()`, or to Polars with `polars.from_arrow(…)`.
"""

from collections.abc import Mapping
from datetime import UTC, date, datetime, time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streaming.errors import UsageError
from streaming.settings import read_settings

if TYPE_CHECKING:
    import pyarrow as pa

Moment = str | date | datetime  # text in ISO 8601; UTC if there is no time zone

# With $limit: the latest rows, or with $below the least confident ones.
PREDICTIONS = """
FROM predictions
WHERE ($label::VARCHAR IS NULL OR label = $label)
  AND ($below::DOUBLE IS NULL OR confidence < $below)
  AND ($version::INTEGER IS NULL OR model_version = $version)
  AND ($since::TIMESTAMPTZ IS NULL OR scored_at >= $since)
"""
PREDICTIONS_ORDER = """
ORDER BY CASE WHEN $below::DOUBLE IS NULL THEN 0 ELSE confidence END, scored_at DESC, "partition", "offset" DESC
LIMIT $limit
"""
QUARANTINE = """
FROM quarantine
WHERE ($reason::VARCHAR IS NULL OR reason = $reason)
  AND ($since::TIMESTAMPTZ IS NULL OR quarantined_at >= $since)
"""
QUARANTINE_ORDER = 'ORDER BY quarantined_at DESC, "partition", "offset" DESC LIMIT $limit'


def predictions(
    home: str | Path | None = None,
    *,
    label: str | None = None,
    below: float | None = None,
    version: int | None = None,
    since: Moment | None = None,
    limit: int | None = None,
    at: Moment | None = None,
) -> "pa.Table":
    """Predictions, one row each, with every column of the table.

    Args:
        home: of the service, a folder or URI; by default that of the command line.
        label: only predictions of this class.
        below: only predictions with a confidence below this one, 0 to 1.
        version: only predictions of this model version.
        since: only predictions that were scored at or after this time.
        limit: the maximum number of rows, latest first, or with `below` least confident first; by default all, in no
            particular order.
        at: read the table as of this time.

    Raises:
        ServiceError: see `sql`.
    """
    values = {"label": label, "below": below, "version": version, "since": _time_of(since)}
    return _select(home, PREDICTIONS, PREDICTIONS_ORDER, values, limit, at)


def quarantine(
    home: str | Path | None = None,
    *,
    reason: str | None = None,
    since: Moment | None = None,
    limit: int | None = None,
    at: Moment | None = None,
) -> "pa.Table":
    """Quarantined messages, one row each, with every column of the table, including the raw bytes (`value`).

    Args:
        home: of the service, a folder or URI; by default that of the command line.
        reason: only messages with this reason, such as `truncated`.
        since: only messages that were quarantined at or after this time.
        limit: the maximum number of rows, latest first; by default all, in no particular order.
        at: read the table as of this time.

    Raises:
        ServiceError: see `sql`.
    """
    return _select(home, QUARANTINE, QUARANTINE_ORDER, {"reason": reason, "since": _time_of(since)}, limit, at)


def sql(
    statement: str,
    home: str | Path | None = None,
    *,
    parameters: Mapping[str, Any] | None = None,
    at: Moment | None = None,
    timeout_s: float = 60.0,
) -> "pa.Table":
    """The rows of a SELECT over the tables.

    Args:
        statement: see `streaming.query.open_query`.
        home: of the service, a folder or URI; by default that of the command line.
        parameters: values of `$name` in the statement.
        at: read the tables as of this time.
        timeout_s: for the whole query.

    Raises:
        ServiceError: there are no tables, `at` is not a valid time or its files have been vacuumed, or the statement is
            rejected.
    """
    from streaming.query import query

    settings = read_settings(home)
    return query(settings, statement, parameters=parameters, timeout_s=timeout_s, at=_time_of(at))


def parse_time(text: Moment) -> datetime:
    """A time with a time zone, by default UTC; a date is its midnight.

    Raises:
        ServiceError: the text is not a valid time.
    """
    try:
        value = datetime.fromisoformat(text) if isinstance(text, str) else text
    except ValueError as error:
        raise UsageError(f"expected a time such as 2026-11-16 or 2026-11-16T09:30+01:00, got {text!r}") from error
    if not isinstance(value, datetime):
        value = datetime.combine(value, time())
    return value if value.tzinfo else value.replace(tzinfo=UTC)


def _time_of(value: Moment | None) -> datetime | None:
    return None if value is None else parse_time(value)


def _select(
    home: str | Path | None, rows: str, order: str, values: Mapping[str, Any], limit: int | None, at: Moment | None
) -> "pa.Table":
    if limit is None:
        return sql(rows, home, parameters=values, at=at)
    return sql(rows + order, home, parameters={**values, "limit": limit}, at=at)
