"""The gateway's application: uploads go to the topic, predictions come from the tables.

POST /images              202 once the broker has acknowledged the image, never before
GET  /predictions/{id}    what became of it, from Delta
GET  /healthz, /readyz    the process is up; the broker answers
"""

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Header, Path, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse

from producer.message import BRANDS, MAGIC
from streaming.errors import ServiceError
from streaming.gateway.access import access
from streaming.gateway.answers import IMAGE_ID, Accepted, Answer, Health, Problem, Unknown
from streaming.gateway.connections import CloseUnread
from streaming.gateway.description import POLICY, page
from streaming.gateway.lookup import Lookup
from streaming.gateway.service import Broker, Service
from streaming.gateway.upload import MAX_LABEL_CHARS
from streaming.settings import Settings

MAX_WAIT_S = 30.0
TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")

IMAGE_TYPES = sorted({*MAGIC.values(), *BRANDS.values(), "image/webp", "image/bmp"})
BINARY = {"type": "string", "format": "binary"}
FORM = {
    "type": "object",
    "required": ["file"],
    "properties": {
        "file": BINARY,
        "label": {"type": "string", "maxLength": MAX_LABEL_CHARS, "description": "the true class, if it is known"},
    },
}
BODY = {
    "required": True,
    "content": {
        "multipart/form-data": {"schema": FORM},
        **{media_type: {"schema": BINARY} for media_type in IMAGE_TYPES},
    },
}


def create_app(settings: Settings, broker: Broker, api_key: str | None = None) -> FastAPI:
    """The application for one home and topic.

    Args:
        api_key: what every request but those for health must carry; None lets this machine's programs in.
    """
    service = Service(broker, Lookup(settings.place))

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    app = FastAPI(
        title="imagestream gateway",
        description="Images in, predictions out. The predictions come when the stream has scored the image.",
        version="1",
        lifespan=lifespan,
        docs_url=None,  # FastAPI's pages load scripts from elsewhere
        redoc_url=None,
        openapi_url=None,
    )
    app.add_middleware(CloseUnread)
    allowed = Depends(access(api_key))
    _take_images(app, service, allowed)
    _tell_predictions(app, service, allowed)
    _tell_health(app, service)
    _describe(app, allowed)
    _tell_problems(app)
    return app


def _problems(*codes: int) -> dict[int | str, dict[str, Any]]:
    """What OpenAPI tells of these answers."""
    return {code: {"model": Problem} for code in codes}


REFUSED = _problems(401, 403, 422, 503)


def _take_images(app: FastAPI, service: Service, allowed: Any) -> None:
    @app.post(
        "/images",
        status_code=202,
        dependencies=[allowed],
        responses=REFUSED | _problems(400, 408, 413, 415),
        openapi_extra={"requestBody": BODY},
    )
    async def publish(
        request: Request,
        label: Annotated[
            str | None, Query(max_length=MAX_LABEL_CHARS, description="the true class, if it is known")
        ] = None,
        traceparent: Annotated[str | None, Header(description="W3C trace context, passed on")] = None,
    ) -> Accepted:
        """Publish an image: a form with the field `file`, or the image itself as the body.

        The answer comes when all replicas of the broker have the image. After a 503 it may be in the topic or not;
        send it again, the image id will be the same.
        """
        trace = traceparent if TRACEPARENT.fullmatch(traceparent or "") else None
        return await service.publish(request, label, trace)


def _tell_predictions(app: FastAPI, service: Service, allowed: Any) -> None:
    @app.get(
        "/predictions/{image_id}",
        response_model=Answer,
        dependencies=[allowed],
        responses=REFUSED | {404: {"model": Unknown}},
    )
    async def predictions(
        image_id: Annotated[str, Path(pattern=IMAGE_ID, description="the SHA-256 of the image's bytes, in hex")],
        wait: Annotated[float, Query(ge=0, le=MAX_WAIT_S, description="seconds to wait for a first row")] = 0.0,
    ) -> Any:
        """What became of an image.

        404 with the status `unknown` says that there is no row of it (yet): it was never published, or waits to be
        scored.
        """
        found = await service.find(image_id, wait)
        if not found:
            return JSONResponse(Unknown(image_id=image_id).model_dump(), 404)
        kinds = found.rows
        status = "predicted" if kinds["predictions"] else "quarantined"
        return Answer(
            image_id=image_id, status=status, predictions=kinds["predictions"], quarantined=kinds["quarantine"]
        )


def _tell_health(app: FastAPI, service: Service) -> None:
    @app.get("/healthz")
    async def healthz() -> Health:
        """The process is up."""
        return Health()

    @app.get("/readyz", responses=_problems(503))
    async def readyz() -> Health:
        """The broker answers, so that images can be published."""
        if not await service.ready():
            raise ServiceError("the broker does not answer")
        return Health()


def _describe(app: FastAPI, allowed: Any) -> None:
    @app.get("/openapi.json", dependencies=[allowed], include_in_schema=False)
    async def openapi() -> JSONResponse:
        return JSONResponse(app.openapi())

    @app.get("/docs", dependencies=[allowed], include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(page(app.openapi()), headers={"Content-Security-Policy": POLICY})


def _tell_problems(app: FastAPI) -> None:
    """Every error is one line of JSON."""

    @app.exception_handler(RequestValidationError)
    async def invalid(_request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:])
        return JSONResponse({"detail": f"{where}: {first['msg']}, got {str(first['input'])[:100]!r}"}, 422)

    @app.exception_handler(ServiceError)
    async def unavailable(_request: Request, error: ServiceError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 503, {"Retry-After": "5"})
