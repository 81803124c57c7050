"""The status code of a response depends on the type of the error, not on its text."""

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from models.errors import ModelError
from streaming.errors import (
    ConfigurationError,
    ConflictError,
    DamagedError,
    DataError,
    NotFoundError,
    ServiceError,
    UnavailableError,
)
from streaming.follow import PositionError
from streaming.gateway.problems import MEDIA_TYPE, RETRY_AFTER_S, handle_problems


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        (DataError, 422),
        (PositionError, 422),
        (NotFoundError, 404),
        (ConflictError, 409),
        (UnavailableError, 503),
        (ConfigurationError, 503),
        (DamagedError, 503),
        (ServiceError, 503),
        (ModelError, 503),
    ],
)
def test_error_type_determines_the_status_code(kind: type[Exception], status: int) -> None:
    app = FastAPI()
    handle_problems(app)

    @app.get("/")
    async def fail() -> None:
        raise type("AnotherNameError", (kind,), {})("one line")

    response = TestClient(app).get("/")
    assert (response.status_code, response.headers["Content-Type"]) == (status, MEDIA_TYPE)
    assert response.json()["detail"] == "one line"
    assert response.headers.get("Retry-After") == (str(RETRY_AFTER_S) if status == 503 else None)
