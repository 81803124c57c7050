"""Lists of predictions, quarantined messages and model versions, with filters and cursor pagination.

A cursor identifies the last row of a page by its sort key, so that rows that are added in the meantime do not shift
other rows between pages. It does not contain the filters, which must be passed again.
"""

import base64
import binascii
import json
import re
from typing import Annotated, Any, ClassVar, Literal

from fastapi import HTTPException
from pydantic import AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from models.errors import ModelError
from streaming.gateway.lookup import TIME_COLUMNS, Lookup, Rows, order
from streaming.gateway.schemas import Model, Models
from streaming.registry import ALIASES, Registry
from streaming.storage.home import Home

RFC_3339 = re.compile(r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(\.\d{1,9})?([Zz]|[+-]\d\d:\d\d)", re.ASCII)
MAX_LIMIT = 500
MAX_TEXT = 1024
MAX_CURSOR_CHARS = 1024


def _rfc_3339(value: Any) -> Any:
    """Reject other formats that Pydantic accepts as a time, such as a number of seconds."""
    if isinstance(value, str) and not RFC_3339.fullmatch(value):
        raise ValueError("expected a time with a time zone, such as 2026-03-01T12:00:00Z")
    return value


Time = Annotated[AwareDatetime, BeforeValidator(_rfc_3339)]
Text = Annotated[str, Field(max_length=MAX_TEXT)]
Offset = Annotated[int, Field(ge=0, lt=2**63)]
RowPlace = tuple[AwareDatetime, Annotated[str, Field(max_length=249)], Offset, Offset]
VersionPlace = tuple[Annotated[int, Field(ge=1, lt=2**63)]]


class ListQuery(BaseModel):
    """The requested page of a list."""

    model_config = ConfigDict(extra="forbid")

    limit: Annotated[int, Field(ge=1, le=MAX_LIMIT, description="maximum number of items")] = 50
    cursor: Annotated[
        str | None, Field(max_length=MAX_CURSOR_CHARS, description="`next_cursor` of the previous page")
    ] = None


class RowQuery(ListQuery):
    """Filters of a table's rows, combined with AND."""

    table: ClassVar[str]
    filters: ClassVar[dict[str, str]] = {}  # name → condition

    source: Annotated[Text | None, Field(description="exact source of the image")] = None
    since: Annotated[Time | None, Field(description="at or after this time, with a time zone")] = None
    until: Annotated[Time | None, Field(description="before this time, with a time zone")] = None

    def condition(self) -> tuple[str, dict[str, Any]]:
        """The SQL condition, and the values of its parameters."""
        time = TIME_COLUMNS[self.table]
        common = {
            "source": "source = $source",
            "since": f"{time} >= $since::TIMESTAMPTZ",
            "until": f"{time} < $until::TIMESTAMPTZ",
        }
        given = self.model_dump(mode="json", exclude_none=True, exclude={"limit", "cursor"})
        parts = [condition for name, condition in (common | self.filters).items() if name in given]
        if self.cursor is not None:
            place = _read_cursor(self.cursor, RowPlace)
            given |= {"at": place[0].isoformat(), "topic": place[1], "partition": place[2], "offset": place[3]}
            parts.append(f"({', '.join(order(self.table))}) < ($at::TIMESTAMPTZ, $topic, $partition, $offset)")
        return " AND ".join(parts) or "true", given


class PredictionQuery(RowQuery):
    """Filters of predictions."""

    table = "predictions"
    filters: ClassVar[dict[str, str]] = {
        "label": "label = $label",
        "model_version": "model_version = $model_version",
        "min_confidence": "confidence >= $min_confidence",
        "max_confidence": "confidence <= $max_confidence",
    }

    label: Annotated[Text | None, Field(description="predicted class")] = None
    model_version: Annotated[int | None, Field(ge=1, lt=2**31)] = None
    min_confidence: Annotated[float | None, Field(ge=0, le=1)] = None
    max_confidence: Annotated[float | None, Field(ge=0, le=1)] = None


class QuarantineQuery(RowQuery):
    """Filters of quarantined messages."""

    table = "quarantine"
    filters: ClassVar[dict[str, str]] = {"stage": "stage = $stage", "reason": "reason = $reason"}

    stage: Annotated[Text | None, Field(description="read, decode, preprocess or score")] = None
    reason: Annotated[Text | None, Field(description="reason code, such as truncated")] = None


class ModelQuery(ListQuery):
    """Filters of model versions."""

    alias: Literal["champion", "challenger"] | None = None


def list_rows(lookup: Lookup, wanted: RowQuery) -> tuple[Rows, str | None]:
    """A page of rows, and the cursor of the next page.

    Raises:
        HTTPException: 422 for an invalid cursor.
    """
    condition, values = wanted.condition()
    rows = lookup.page(wanted.table, condition, values, wanted.limit + 1)
    if len(rows) <= wanted.limit:
        return rows, None
    last = rows[wanted.limit - 1]
    place = [last[TIME_COLUMNS[wanted.table]].isoformat(), last["topic"], last["partition"], last["offset"]]
    return rows[: wanted.limit], _cursor(place)


def list_models(home: Home, wanted: ModelQuery) -> Models:
    """A page of the registry's versions, latest first."""
    registry = Registry(home.store)
    targets = registry.targets()
    versions = sorted(registry.versions(), reverse=True)
    if wanted.alias is not None:
        versions = [version for version in versions if version == targets[wanted.alias]]
    if wanted.cursor is not None:
        (last,) = _read_cursor(wanted.cursor, VersionPlace)
        versions = [version for version in versions if version < last]
    page = versions[: wanted.limit]
    models = [_model(registry, version, [one for one in ALIASES if targets[one] == version]) for version in page]
    return Models(items=models, next_cursor=_cursor([page[-1]]) if len(versions) > wanted.limit else None)


def _model(registry: Registry, version: int, aliases: list[Literal["champion", "challenger"]]) -> Model:
    try:
        manifest = registry.manifest(version)
    except ModelError as error:
        return Model(version=version, aliases=aliases, backbone=None, classes=[], metrics={}, error=str(error))
    classes, backbone = list(manifest.classes), manifest.backbone.name
    return Model(
        version=version, aliases=aliases, backbone=backbone, classes=classes, metrics=manifest.metrics, error=None
    )


def _cursor(place: list[Any]) -> str:
    return base64.urlsafe_b64encode(json.dumps(place, separators=(",", ":")).encode()).decode().rstrip("=")


def _read_cursor(cursor: str, kind: Any) -> Any:
    try:
        text = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
        return TypeAdapter(kind).validate_json(text)
    except (binascii.Error, ValueError, ValidationError) as error:
        raise HTTPException(422, "cursor: expected the next_cursor of an earlier response") from error
