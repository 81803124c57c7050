"""What the service answered, as Arrow tables, for notebooks and scripts: `from streaming import predictions`.

Nothing here starts a JVM. Each function reads the tables as they are when it is called, or as they were at a time;
`.to_pandas()` of a result is pandas, `polars.from_arrow(…)` Polars.
"""

from collections.abc import Mapping
from datetime import UTC, date, datetime, time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streaming.errors import UsageError
from streaming.settings import read_settings

if TYPE_CHECKING:
    import pyarrow as pa

Moment = str | date | datetime  # a text is ISO 8601; what names no zone is UTC

# Of $limit rows: the latest, or below a confidence the least sure.
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
        home: where the service keeps its things; without it as the command line finds it.
        label: only what was predicted to be this class.
        below: only below this confidence.
        version: only by this model version.
        since: only what was scored from then on.
        limit: only so many: the latest, or with `below` the least sure first. Without it all, in no order.
        at: the table as it was then.

    Raises:
        ServiceError: as for `sql`.
    """
    values = {"label": label, "below": below, "version": version, "since": _moment(since)}
    return _select(home, PREDICTIONS, PREDICTIONS_ORDER, values, limit, at)


def quarantine(
    home: str | Path | None = None,
    *,
    reason: str | None = None,
    since: Moment | None = None,
    limit: int | None = None,
    at: Moment | None = None,
) -> "pa.Table":
    """Quarantined messages, one row each, with every column of the table, the raw bytes (`value`) among them.

    Args:
        home: where the service keeps its things; without it as the command line finds it.
        reason: only what was quarantined for it, such as `truncated`.
        since: only what was quarantined from then on.
        limit: only so many, the latest first. Without it all, in no order.
        at: the table as it was then.

    Raises:
        ServiceError: as for `sql`.
    """
    return _select(home, QUARANTINE, QUARANTINE_ORDER, {"reason": reason, "since": _moment(since)}, limit, at)


def sql(
    statement: str,
    home: str | Path | None = None,
    *,
    parameters: Mapping[str, Any] | None = None,
    at: Moment | None = None,
    timeout_s: float = 60.0,
) -> "pa.Table":
    """What one SELECT over the tables gives; `parameters` are the values of `$name` in it.

    Raises:
        ServiceError: there are no tables, `at` is no time or one whose files are gone, or the statement is none that
            `streaming.query.open_query` takes.
    """
    from streaming.query import query

    settings = read_settings(home)
    return query(settings, statement, parameters=parameters, timeout_s=timeout_s, at=_moment(at))


def moment(text: Moment) -> datetime:
    """A time with its zone, UTC where none is named; a date alone is its first moment.

    Raises:
        ServiceError: the text is no time.
    """
    try:
        value = datetime.fromisoformat(text) if isinstance(text, str) else text
    except ValueError as error:
        raise UsageError(f"expected a time such as 2026-11-16 or 2026-11-16T09:30+01:00, got {text!r}") from error
    if not isinstance(value, datetime):
        value = datetime.combine(value, time())
    return value if value.tzinfo else value.replace(tzinfo=UTC)


def _moment(value: Moment | None) -> datetime | None:
    return None if value is None else moment(value)


def _select(
    home: str | Path | None,
    rows: str,
    order: str,
    values: Mapping[str, Any],
    limit: int | None,
    at: Moment | None,
) -> "pa.Table":
    if limit is None:
        return sql(rows, home, parameters=values, at=at)
    return sql(rows + order, home, parameters={**values, "limit": limit}, at=at)
