"""The schemas of the gateway's requests and responses."""

from datetime import datetime
from typing import Literal

from pydantic import BaseModel, Field

MAX_ID_CHARS = 1024  # of a `ce_id`


class Accepted(BaseModel):
    """The broker has acknowledged the image, so it will be scored."""

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
    """One message of the image that could not be scored, and the reason."""

    stage: str
    reason: str
    detail: str
    topic: str
    partition: int
    offset: int
    published_at: datetime | None
    quarantined_at: datetime


class Named(BaseModel):
    """The image of a row in a list."""

    image_id: str
    source: str | None
    label_true: str | None = Field(description="the label that was published with the image")


class ListedPrediction(Named, Prediction):
    """A prediction in a list."""


class ListedQuarantined(Named, Quarantined):
    """A quarantined message in a list."""


class Page(BaseModel):
    """A page of a list, latest first."""

    next_cursor: str | None = Field(description="pass it as `cursor` to get the next page; null on the last page")


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
    error: str | None = Field(description="why the version cannot be used, if its manifest is damaged")


class Models(Page):
    """Versions in the registry."""

    items: list[Model]


class GivenLabel(BaseModel):
    """The true class of an image."""

    image: str = Field(max_length=1024, description="id, source or name of the image, depending on `key`")
    label: str = Field(max_length=200)


class Labels(BaseModel):
    """Labels for images in the tables."""

    key: Literal["image_id", "source", "name"] = Field("image_id", description="what identifies the images")
    by: str = Field("gateway", min_length=1, max_length=200, description="author of the labels, stored with them")
    labels: list[GivenLabel] = Field(min_length=1, max_length=10_000)


class LabelsAdded(BaseModel):
    """The result of a request with labels."""

    added: int = Field(description="images whose label was added")
    unchanged: int = Field(description="images that already had this label")
    superseded: int = Field(description="images whose label from this same request was corrected later and is kept")
    left_out: dict[str, int] = Field(description="reason → number of labels that were not used")
    examples: dict[str, list[str]] = Field(description="reason → some of the images of these labels")


class Answer(BaseModel):
    """The results of an image: one per message, latest first, at most 100 of each kind."""

    image_id: str
    status: Literal["predicted", "quarantined"]
    predictions: list[Prediction]
    quarantined: list[Quarantined]


class Unknown(BaseModel):
    """The 404 of the deprecated route: the image has no row yet."""

    image_id: str
    status: Literal["unknown"] = "unknown"


class Health(BaseModel):
    """A passed health check."""

    status: Literal["ok"] = "ok"
