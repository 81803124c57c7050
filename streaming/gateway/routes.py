"""The routes of the gateway's version 1, and those from before it.

POST /images, /images/batch    202 once the broker has acknowledged the image, or all of them, never before
GET  /predictions/{id}         what became of it, from Delta
POST /labels                   true classes of images, as `imagestream label` takes them
GET  /predictions, /quarantine, /models         lists, page by page
"""

from collections import Counter
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Header, HTTPException, Path, Query, Request, Response
from fastapi.responses import JSONResponse

from producer.message import BRANDS, MAGIC
from streaming.gateway.answers import (
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
from streaming.gateway.deprecation import PREFIX
from streaming.gateway.lists import ModelQuery, PredictionQuery, QuarantineQuery
from streaming.gateway.problems import problem, problems
from streaming.gateway.service import Service
from streaming.gateway.upload import MAX_BATCH_IMAGES, MAX_LABEL_CHARS, MAX_SOURCE_CHARS
from streaming.tracing import publishing

MAX_WAIT_S = 30.0
REFUSED = problems(401, 403, 422, 429, 503)
UPLOAD_REFUSED = REFUSED | problems(400, 408, 413, 415)
UNKNOWN = "the tables have no row of this image: it was never published, or waits to be scored"

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
LOCATION = {"Location": {"description": "where its predictions will be", "schema": {"type": "string"}}}

LabelParameter = Annotated[str | None, Query(max_length=MAX_LABEL_CHARS, description="the true class, if it is known")]
SourceParameter = Annotated[
    str | None,
    Query(
        max_length=MAX_SOURCE_CHARS,
        description="where the image comes from, the column source; default: the file name of the form, else gateway",
    ),
]
TraceHeader = Annotated[str | None, Header(description="W3C trace context, continued with the image")]
IdParameter = Annotated[
    str,
    Path(min_length=1, max_length=MAX_ID_CHARS, description="the SHA-256 of the image's bytes in hex, or its ce_id"),
]


async def refuse_repeated(request: Request) -> None:
    """422 for a parameter that is given twice: every one has one value, and which was meant is not known."""
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

        The answer comes when all replicas of the broker have the image. After a 503 it may be in the topic or not;
        send it again, the image id will be the same.
        """
        with publishing(traceparent) as trace:
            accepted = await service.publish(request, label, source, trace)
        response.headers["Location"] = f"{PREFIX}/predictions/{accepted.image_id}"
        return accepted


def _add_batch(router: APIRouter, service: Service) -> None:
    @router.post("/images/batch", status_code=202, responses=UPLOAD_REFUSED, openapi_extra={"requestBody": BATCH_BODY})
    async def publish_several(request: Request, traceparent: TraceHeader = None) -> AcceptedImages:
        """Publish several images: a form with a field `file` for each, and one `label` for all if they share it.

        If one of them is refused, none is published. After a 503 some may be in the topic; send all again, their ids
        will be the same.
        """
        with publishing(traceparent) as trace:
            return AcceptedImages(images=await service.publish_several(request, trace))


def _add_predictions(router: APIRouter, service: Service) -> None:
    @router.get("/predictions/{image_id:path}", response_model=Answer, responses=REFUSED | problems(404))
    async def prediction(
        image_id: IdParameter,
        wait: Annotated[float, Query(ge=0, le=MAX_WAIT_S, description="seconds to wait for a first row")] = 0.0,
    ) -> Any:
        """What became of an image; 404 as long as there is no row of it."""
        return await _answer(service, image_id, wait) or problem(404, UNKNOWN)


def _add_lists(router: APIRouter, service: Service) -> None:
    @router.get("/predictions", response_model=Predictions, responses=REFUSED)
    async def list_predictions(wanted: Annotated[PredictionQuery, Query()]) -> Any:
        """The predictions that match every filter, the latest first."""
        items, cursor = await service.list_rows(wanted)
        return {"items": items, "next_cursor": cursor}

    @router.get("/quarantine", response_model=Quarantine, responses=REFUSED)
    async def list_quarantine(wanted: Annotated[QuarantineQuery, Query()]) -> Any:
        """The quarantined messages that match every filter, the latest first, without their bytes."""
        items, cursor = await service.list_rows(wanted)
        return {"items": items, "next_cursor": cursor}

    @router.get("/models", responses=REFUSED)
    async def list_models(wanted: Annotated[ModelQuery, Query()]) -> Models:
        """The model versions, the latest first."""
        return await service.list_models(wanted)


def _add_labels(router: APIRouter, service: Service) -> None:
    @router.post(
        "/labels",
        responses=REFUSED | problems(400, 404, 408, 409, 413, 415),
        openapi_extra={"requestBody": {"required": True, "content": {"application/json": {"schema": LABELS}}}},
    )
    async def add_labels(request: Request) -> LabelsAdded:
        """Give images that the tables hold their true labels, or other ones; the next retraining goes by them.

        Of several labels of an image the latest counts, and it counts more than the one that came with the image. The
        same request again adds nothing. `left_out` counts the labels whose image is not known, or not unambiguous.
        """
        return LabelsAdded(**asdict(await service.add_labels(request)))


def old_routes(service: Service) -> APIRouter:
    """The routes from before version 1, as they were."""
    router = APIRouter()
    _add_images(router, service)

    @router.get("/predictions/{image_id:path}", response_model=Answer, responses=REFUSED | {404: {"model": Unknown}})
    async def prediction(
        image_id: IdParameter,
        wait: Annotated[float, Query(ge=0, le=MAX_WAIT_S, description="seconds to wait for a first row")] = 0.0,
    ) -> Any:
        """What became of an image; 404 as long as there is no row of it."""
        unknown = JSONResponse(Unknown(image_id=image_id).model_dump(), 404)
        return await _answer(service, image_id, wait) or unknown

    return router


async def _answer(service: Service, image_id: str, wait_s: float) -> Answer | None:
    """What became of an image; None if there is no row of it when so many seconds have passed."""
    found = await service.find(image_id, wait_s)
    if not found:
        return None
    predictions, quarantined = found.rows["predictions"], found.rows["quarantine"]
    status = "predicted" if predictions else "quarantined"
    return Answer.model_validate(
        {"image_id": image_id, "status": status, "predictions": predictions, "quarantined": quarantined}
    )
