"""The gateway's error responses: application/problem+json documents (RFC 9457) with one line of detail."""

from collections.abc import Mapping
from http import HTTPStatus
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.responses import Response

from models.errors import ModelError
from streaming.errors import ConflictError, DataError, NotFoundError, ServiceError, UnavailableError

if TYPE_CHECKING:  # the dashboard's server uses this module without FastAPI
    from fastapi import FastAPI, Request

MEDIA_TYPE = "application/problem+json"
RETRY_AFTER_S = 5
UNAVAILABLE = 503
# The nearest base class counts. A problem of the service itself is not the client's mistake: a wrong setting, a
# damaged table or a damaged model is 503.
STATUS_CODES: Mapping[type[Exception], int] = MappingProxyType(
    {
        DataError: 422,
        NotFoundError: 404,
        ConflictError: 409,
        UnavailableError: UNAVAILABLE,
        ServiceError: UNAVAILABLE,
        ModelError: UNAVAILABLE,
    }
)


class Problem(BaseModel):
    """An error."""

    type: str = Field("about:blank", description="about:blank: the kind of error is given by the status code")
    title: str = Field(description="the name of the status code")
    status: int
    detail: str = Field(description="what was expected and what was found, on one line")


def problem(status: int, detail: str, headers: Mapping[str, str] | None = None) -> Response:
    """The response to a request that was rejected or failed."""
    found = Problem(title=HTTPStatus(status).phrase, status=status, detail=detail)
    return Response(found.model_dump_json(), status, headers, MEDIA_TYPE)


def status_of(error: ServiceError | ModelError) -> int:
    """The status code of an error that a request ended with, by its type."""
    return next(STATUS_CODES[one] for one in type(error).__mro__ if one in STATUS_CODES)


def problems(*codes: int) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI description of error responses; `declare` completes it."""
    return {code: {"model": Problem, "description": HTTPStatus(code).phrase} for code in codes}


def declare(openapi: dict[str, Any]) -> None:
    """Set the media type of error responses in an OpenAPI description, which FastAPI cannot."""
    for operations in openapi["paths"].values():
        for operation in operations.values():
            for answer in operation["responses"].values():
                schema = answer.get("content", {}).get("application/json")
                if schema and schema["schema"].get("$ref", "").endswith("/Problem"):
                    answer["content"] = {MEDIA_TYPE: schema}


def too_many(detail: str, retry_after_s: int = 1) -> HTTPException:
    """A 429 response with Retry-After, in seconds."""
    return HTTPException(429, detail, {"Retry-After": str(retry_after_s)})


def handle_problems(app: "FastAPI") -> None:
    """Convert all errors of the application to problem documents."""
    from fastapi.exceptions import RequestValidationError

    @app.exception_handler(HTTPException)
    async def refused(_request: "Request", error: HTTPException) -> Response:
        return problem(error.status_code, error.detail, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_request: "Request", error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:])
        return problem(422, f"{where}: {first['msg']}, got {str(first['input'])[:100]!r}")

    @app.exception_handler(ServiceError)
    @app.exception_handler(ModelError)
    async def typed(_request: "Request", error: ServiceError | ModelError) -> Response:
        status = status_of(error)
        return problem(status, str(error), {"Retry-After": str(RETRY_AFTER_S)} if status == UNAVAILABLE else None)

    @app.exception_handler(Exception)
    async def failed(_request: "Request", _error: Exception) -> Response:
        return problem(500, "internal error: see the gateway's log")
