"""Imported networks: their entry in the manifest, and the engine that runs them.

The engine maps pixels (N, H, W, C) to float32 features (N, D). The network's preprocessing is in `models.recipe`.
"""

import hashlib
import json
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from models.arrays import Features
from models.errors import ModelError
from models.recipe import Layout, Recipe

Format = Literal["onnx", "tflite"]
FILES: dict[Format, str] = {"onnx": "backbone.onnx", "tflite": "backbone.tflite"}
MAX_FEATURES = 1_000_000


class Network(BaseModel):
    """The manifest's entry of an imported network.

    Attributes:
        format: the format of the file that is run, which may differ from that of the imported file.
        source, source_sha256: the name and hash of the imported file.
        tensor: the name of the tensor with the features.
        layout: the layout of a tensor of four dimensions, for pooling.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    format: Format
    source: str = Field(max_length=255)
    source_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    tensor: str = Field(max_length=1_000)
    recipe: Recipe
    layout: Layout = "nhwc"

    @property
    def file(self) -> str:
        """Its name in a bundle."""
        return FILES[self.format]

    def identity(self, file_sha256: str, output: str) -> str:
        """SHA-256 of everything that determines an image's features: the file, the recipe and the reduction."""
        facts = [file_sha256, self.recipe.model_dump(mode="json"), self.layout, output]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


class Session(Protocol):
    """A loaded file, from the tensor of a recipe to the tensor of features.

    Attributes:
        batch: the number of images per call; 0 for any.
    """

    @property
    def batch(self) -> int: ...

    def run(self, tensor: NDArray[Any]) -> NDArray[Any]: ...


class NetworkEngine:
    """Runs an imported network; implements `models.scorer.Engine`."""

    def __init__(self, network: Network, output: Literal["pooled", "flat"], session: Session) -> None:
        """Raises ModelError if the network cannot run on the tensor of its recipe."""
        self._recipe = network.recipe
        self._layout = network.layout
        self._pooled = output == "pooled"
        self._session = session
        self.input_size: tuple[int, int] = network.recipe.input_size
        blank = np.zeros((1, *network.recipe.pixel_shape), network.recipe.pixel_dtype)
        self.n_features: int = self._features(blank).shape[1]
        if self.n_features > MAX_FEATURES:
            raise ModelError(
                f"the network computes {self.n_features:,} features, at most {MAX_FEATURES:,} are accepted"
            )

    def __call__(self, images: NDArray[Any]) -> Features:
        """Features (N, D) of `images` (N, H, W, C), in their order; raises ModelError for another shape."""
        if images.shape[1:] != self._recipe.pixel_shape:
            raise ModelError(f"expected images of shape (N, {self._recipe.pixel_shape}), got {images.shape}")
        features = np.empty((len(images), self.n_features), np.float32)
        step = self._session.batch or 1
        for start in range(0, len(images), step):
            features[start : start + step] = self._features(images[start : start + step])
        return features

    def _features(self, images: NDArray[Any]) -> Features:
        n, batch = len(images), self._session.batch
        if batch > n:  # the network has a fixed batch size
            images = np.concatenate([images, np.zeros((batch - n, *images.shape[1:]), images.dtype)])
        values = self._session.run(self._recipe.tensor(images))
        if not values.size or values.size % len(images):
            raise ModelError(f"the network returns a tensor of shape {values.shape} for {len(images)} images")
        values = values.reshape(len(images), -1) if values.shape[:1] != (len(images),) else values
        return self._reduced(values[:n].astype(np.float32))

    def _reduced(self, values: Features) -> Features:
        """The mean over all positions of a map (or a sequence, (N, T, C)) if pooled, else the flattened map."""
        if self._pooled and values.ndim > 2:  # noqa: PLR2004
            first = 2 if self._layout == "nchw" and values.ndim == 4 else 1  # noqa: PLR2004
            values = values.mean(axis=tuple(range(first, first + values.ndim - 2)))
        return values.reshape(len(values), -1)
