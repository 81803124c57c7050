"""The routes of the gateway's version 1, and the deprecated ones without a version.

POST /images, /images/batch    202 as soon as the broker has acknowledged the image, or all images
GET  /predictions/{id}         the results of an image, from Delta
POST /labels                   true classes of images, as for `imagestream label`
GET  /predictions, /quarantine, /models         paginated lists
"""

from collections import Counter
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Header, HTTPException, Path, Query, Request, Response
from fastapi.responses import JSONResponse

from producer.class_names import MAX_LABEL_CHARS
from producer.message import BRANDS, MAGIC
from streaming.gateway.deprecation import PREFIX
from streaming.gateway.listing import ModelQuery, PredictionQuery, QuarantineQuery
from streaming.gateway.problems import problem, problems
from streaming.gateway.schemas import (
    MAX_ID_CHARS,
    Accepted,
    AcceptedImages,
    Answer,
    Labels,
    LabelsAdded,
    Models,
    Predictions,
    Quarantine,
    Unknown,
)
from streaming.gateway.service import Service
from streaming.gateway.upload import MAX_BATCH_IMAGES, MAX_SOURCE_CHARS
from streaming.tracing import publishing

MAX_WAIT_S = 30.0
REFUSED = problems(401, 403, 422, 429, 503)
UPLOAD_REFUSED = REFUSED | problems(400, 408, 413, 415)
UNKNOWN = "the tables have no row of this image: it was never published, or has not been scored yet"

IMAGE_TYPES = sorted({*MAGIC.values(), *BRANDS.values(), "image/webp", "image/bmp"})
BINARY = {"type": "string", "format": "binary"}
LABEL = {"type": "string", "maxLength": MAX_LABEL_CHARS, "description": "the true class, if it is known"}
FORM = {"type": "object", "required": ["file"], "properties": {"file": BINARY, "label": LABEL}}
BODY = {
    "required": True,
    "content": {
        "multipart/form-data": {"schema": FORM},
        **{media_type: {"schema": BINARY} for media_type in IMAGE_TYPES},
    },
}
SEVERAL = {
    "type": "object",
    "required": ["file"],
    "properties": {
        "file": {"type": "array", "items": BINARY, "minItems": 1, "maxItems": MAX_BATCH_IMAGES},
        "label": LABEL,
    },
}
BATCH_BODY = {"required": True, "content": {"multipart/form-data": {"schema": SEVERAL}}}
LABELS = Labels.model_json_schema()
LABELS["properties"]["labels"]["items"] = LABELS.pop("$defs")["GivenLabel"]
LOCATION = {"Location": {"description": "URL of its predictions", "schema": {"type": "string"}}}

LabelParameter = Annotated[str | None, Query(max_length=MAX_LABEL_CHARS, description="the true class, if it is known")]
SourceParameter = Annotated[
    str | None,
    Query(
        max_length=MAX_SOURCE_CHARS,
        description="origin of the image, for the column source; default: the form's file name, or else gateway",
    ),
]
TraceHeader = Annotated[str | None, Header(description="W3C trace context, continued with the image")]
IdParameter = Annotated[
    str,
    Path(min_length=1, max_length=MAX_ID_CHARS, description="the SHA-256 of the image's bytes in hex, or its ce_id"),
]


async def check_not_repeated(request: Request) -> None:
    """Reject a repeated query parameter with 422, since it is ambiguous."""
    names = Counter(name for name, _ in request.query_params.multi_items())
    for name, count in names.items():
        if count > 1:
            raise HTTPException(422, f"{name[:50]!r}: expected one value, got {count}")


def routes(service: Service) -> APIRouter:
    """The routes of version 1."""
    router = APIRouter(prefix=PREFIX)
    _add_images(router, service)
    _add_batch(router, service)
    _add_lists(router, service)
    _add_predictions(router, service)
    _add_labels(router, service)
    return router


def _add_images(router: APIRouter, service: Service) -> None:
    @router.post(
        "/images",
        status_code=202,
        responses=UPLOAD_REFUSED | {202: {"headers": LOCATION}},
        openapi_extra={"requestBody": BODY},
    )
    async def publish(
        request: Request,
        response: Response,
        label: LabelParameter = None,
        source: SourceParameter = None,
        traceparent: TraceHeader = None,
    ) -> Accepted:
        """Publish an image: a form with the field `file`, or the image itself as the body.

        The response is sent when all replicas of the broker have the image. After a 503, the image may or may not be in
        the topic: send it again; it will have the same image id.
        """
        with publishing(traceparent) as trace:
            accepted = await service.publish(request, label, source, trace)
        response.headers["Location"] = f"{PREFIX}/predictions/{accepted.image_id}"
        return accepted


def _add_batch(router: APIRouter, service: Service) -> None:
    @router.post("/images/batch", status_code=202, responses=UPLOAD_REFUSED, openapi_extra={"requestBody": BATCH_BODY})
    async def publish_several(request: Request, traceparent: TraceHeader = None) -> AcceptedImages:
        """Publish several images: a form with a field `file` for each, and optionally one `label` for all.

        If one of them is rejected, none is published. After a 503, some may be in the topic: send all again; they will
        have the same image ids.
        """
        with publishing(traceparent) as trace:
            return AcceptedImages(images=await service.publish_several(request, trace))


def _add_predictions(router: APIRouter, service: Service) -> None:
    @router.get("/predictions/{image_id:path}", response_model=Answer, responses=REFUSED | problems(404))
    async def prediction(
        image_id: IdParameter,
        wait: Annotated[float, Query(ge=0, le=MAX_WAIT_S, description="seconds to wait for a first row")] = 0.0,
    ) -> Any:
        """The results of an image; 404 if it has no row yet."""
        return await _answer(service, image_id, wait) or problem(404, UNKNOWN)


def _add_lists(router: APIRouter, service: Service) -> None:
    @router.get("/predictions", response_model=Predictions, responses=REFUSED)
    async def list_predictions(wanted: Annotated[PredictionQuery, Query()]) -> Any:
        """The predictions that match all filters, latest first."""
        items, cursor = await service.list_rows(wanted)
        return {"items": items, "next_cursor": cursor}

    @router.get("/quarantine", response_model=Quarantine, responses=REFUSED)
    async def list_quarantine(wanted: Annotated[QuarantineQuery, Query()]) -> Any:
        """The quarantined messages that match all filters, latest first, without their bytes."""
        items, cursor = await service.list_rows(wanted)
        return {"items": items, "next_cursor": cursor}

    @router.get("/models", responses=REFUSED)
    async def list_models(wanted: Annotated[ModelQuery, Query()]) -> Models:
        """The model versions, latest first."""
        return await service.list_models(wanted)


def _add_labels(router: APIRouter, service: Service) -> None:
    @router.post(
        "/labels",
        responses=REFUSED | problems(400, 404, 408, 409, 413, 415),
        openapi_extra={"requestBody": {"required": True, "content": {"application/json": {"schema": LABELS}}}},
    )
    async def add_labels(request: Request) -> LabelsAdded:
        """Add or correct true labels of images in the tables; the next retraining uses them.

        The latest label of an image counts, and takes precedence over the one that was published with the image.
        Repeating a request adds nothing. `left_out` counts the labels whose image is unknown or ambiguous.
        """
        return LabelsAdded(**asdict(await service.add_labels(request)))


def old_routes(service: Service) -> APIRouter:
    """The deprecated routes without a version."""
    router = APIRouter()
    _add_images(router, service)

    @router.get("/predictions/{image_id:path}", response_model=Answer, responses=REFUSED | {404: {"model": Unknown}})
    async def prediction(
        image_id: IdParameter,
        wait: Annotated[float, Query(ge=0, le=MAX_WAIT_S, description="seconds to wait for a first row")] = 0.0,
    ) -> Any:
        """The results of an image; 404 if it has no row yet."""
        unknown = JSONResponse(Unknown(image_id=image_id).model_dump(), 404)
        return await _answer(service, image_id, wait) or unknown

    return router


async def _answer(service: Service, image_id: str, wait_s: float) -> Answer | None:
    """The results of an image; None if it has no row after `wait_s` seconds."""
    found = await service.find(image_id, wait_s)
    if not found:
        return None
    predictions, quarantined = found.rows["predictions"], found.rows["quarantine"]
    status = "predicted" if predictions else "quarantined"
    return Answer.model_validate(
        {"image_id": image_id, "status": status, "predictions": predictions, "quarantined": quarantined}
    )
