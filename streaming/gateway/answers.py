"""What the gateway answers, as OpenAPI describes it."""

from datetime import datetime
from typing import Literal

from pydantic import BaseModel, Field

MAX_ID_CHARS = 1024  # as much as is kept of an id of one's own


class Accepted(BaseModel):
    """The broker has acknowledged the image: it will be scored."""

    image_id: str = Field(description="the SHA-256 of the image's bytes, in hex")
    topic: str
    partition: int
    offset: int


class AcceptedImages(BaseModel):
    """The broker has acknowledged all images of the request."""

    images: list[Accepted] = Field(description="in the order of the request")


class Ranked(BaseModel):
    """A class and its probability."""

    label: str
    probability: float


class Prediction(BaseModel):
    """One scored message of the image."""

    label: str
    confidence: float
    top_k: list[Ranked]
    model_version: int
    topic: str
    partition: int
    offset: int
    published_at: datetime | None
    scored_at: datetime


class Quarantined(BaseModel):
    """One message of the image that could not be scored, and why."""

    stage: str
    reason: str
    detail: str
    topic: str
    partition: int
    offset: int
    published_at: datetime | None
    quarantined_at: datetime


class Named(BaseModel):
    """Which image a row of a list is of."""

    image_id: str
    source: str | None
    label_true: str | None = Field(description="the label that came with the image")


class ListedPrediction(Named, Prediction):
    """A prediction in a list."""


class ListedQuarantined(Named, Quarantined):
    """A quarantined message in a list."""


class Page(BaseModel):
    """A part of a list, the latest first."""

    next_cursor: str | None = Field(description="give it as `cursor` for the next part; null: this was the last")


class Predictions(Page):
    """Predictions."""

    items: list[ListedPrediction]


class Quarantine(Page):
    """Quarantined messages."""

    items: list[ListedQuarantined]


class Model(BaseModel):
    """A version in the registry."""

    version: int
    aliases: list[Literal["champion", "challenger"]]
    backbone: str | None
    classes: list[str]
    metrics: dict[str, float] = Field(description="of held-out images, when it was fitted")
    error: str | None = Field(description="why the version cannot be used, where its manifest is damaged")


class Models(Page):
    """Versions in the registry."""

    items: list[Model]


class GivenLabel(BaseModel):
    """The true class of an image."""

    image: str = Field(max_length=1024, description="its id, source or name, as `key` says")
    label: str = Field(max_length=200)


class Labels(BaseModel):
    """Labels for images that the tables hold."""

    key: Literal["image_id", "source", "name"] = Field("image_id", description="what names the images")
    by: str = Field("gateway", min_length=1, max_length=200, description="who says so; kept with the labels")
    labels: list[GivenLabel] = Field(min_length=1, max_length=10_000)


class LabelsAdded(BaseModel):
    """What became of the labels of a request."""

    added: int = Field(description="images whose label was added")
    unchanged: int = Field(description="images that had this label already")
    superseded: int = Field(description="images whose label of this very request was corrected since; that one stays")
    left_out: dict[str, int] = Field(description="why → labels that were not used")
    examples: dict[str, list[str]] = Field(description="why → some of the images that they name")


class Answer(BaseModel):
    """What became of an image: every message of it, the latest first, at most 100 of each kind."""

    image_id: str
    status: Literal["predicted", "quarantined"]
    predictions: list[Prediction]
    quarantined: list[Quarantined]


class Unknown(BaseModel):
    """The 404 of the route from before /v1: the image has no row yet."""

    image_id: str
    status: Literal["unknown"] = "unknown"


class Health(BaseModel):
    """The gateway, or what it stands on, is there."""

    status: Literal["ok"] = "ok"
