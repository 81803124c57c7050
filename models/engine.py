"""Engines that run a backbone: LiteRT on CPU, and Keras as the reference.

Every engine maps uint8 (N, H, W, 3) RGB pixels, values 0..255, to float32 features (N, D), for any N from 0.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from models.architectures import BackboneSpec
from models.errors import ModelError

if TYPE_CHECKING:
    import keras

_KERAS_CHUNK = 32  # images; bounds the memory


class LiteRTEngine:
    """A LiteRT (XNNPACK) interpreter of one flatbuffer; does not import TensorFlow. Not thread-safe.

    Images are processed one at a time: activations stay in the processor's cache, which is about 20 % faster than
    batches of 32, and the features of an image cannot depend on other images.
    """

    def __init__(self, flatbuffer: bytes | Path, threads: int = 1) -> None:
        """Load a flatbuffer from its bytes or file.

        Raises:
            ModelError: it is not a LiteRT model from uint8 (N, H, W, 3) to float32 (N, D).
        """
        from ai_edge_litert.interpreter import Interpreter

        try:
            content = flatbuffer.read_bytes() if isinstance(flatbuffer, Path) else flatbuffer
            with without_native_log():
                self._interpreter = Interpreter(model_content=content, num_threads=threads)
                self._interpreter.allocate_tensors()
        except (OSError, ValueError, RuntimeError) as error:
            raise ModelError(f"not a usable LiteRT model: {error}") from error
        inputs, outputs = self._interpreter.get_input_details(), self._interpreter.get_output_details()
        if not _is_backbone(inputs, outputs):
            got = [(_shape(tensor), np.dtype(tensor["dtype"]).name) for tensor in (*inputs, *outputs)]
            raise ModelError(f"expected a backbone from uint8 (1, H, W, 3) to float32 (1, D), got {got}")
        self._input_index, self._output_index = inputs[0]["index"], outputs[0]["index"]
        _, height, width, _ = _shape(inputs[0])
        self._input_size = (height, width)
        self._n_features = _shape(outputs[0])[1]

    @property
    def input_size(self) -> tuple[int, int]:
        """(height, width) of the input."""
        return self._input_size

    @property
    def n_features(self) -> int:
        """D, the number of features per image."""
        return self._n_features

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Features (N, D) of `images` (N, H, W, 3), in their order; raises ModelError for another shape or dtype."""
        _check_images(images, self._input_size)
        features = np.empty((len(images), self._n_features), np.float32)
        for i in range(len(images)):
            self._interpreter.set_tensor(self._input_index, images[i : i + 1])
            self._interpreter.invoke()
            features[i] = self._interpreter.get_tensor(self._output_index)[0]
        return features


class KerasEngine:
    """A Keras backbone with the interface of an engine."""

    def __init__(self, model: "keras.Model") -> None:
        self._model = model
        _, height, width, _ = model.input_shape
        self.input_size: tuple[int, int] = (height, width)
        self.n_features: int = model.output_shape[1]

    @classmethod
    def of(cls, spec: BackboneSpec, weights: bytes) -> Self:
        """Build the engine of a backbone from the content of a `.weights.h5` file.

        Takes seconds and half a gigabyte of memory, mostly for TensorFlow.

        Raises:
            ModelError: the weights do not fit the backbone.
        """
        from models.backbone import build

        with NamedTemporaryFile(suffix=".weights.h5") as file:
            file.write(weights)
            file.flush()
            return cls(build(spec.name, file.name, output=spec.output, input_size=spec.input_size))

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Features (N, D) of `images` (N, H, W, 3), in their order; raises ModelError for another shape or dtype."""
        _check_images(images, self.input_size)
        features = np.empty((len(images), self.n_features), np.float32)
        for start in range(0, len(images), _KERAS_CHUNK):
            chunk = slice(start, start + _KERAS_CHUNK)
            features[chunk] = np.asarray(self._model(images[chunk], training=False))
        return features


@contextmanager
def without_native_log() -> Iterator[None]:
    """Discard the standard error of native code: LiteRT logs every interpreter there, with no option to disable it.

    LiteRT reports errors as exceptions.
    """
    saved = os.dup(2)
    try:
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def _check_images(images: NDArray[np.uint8], size: tuple[int, int]) -> None:
    if images.dtype != np.uint8 or images.shape[1:] != (*size, 3):
        raise ModelError(
            f"expected uint8 images of shape (N, {size[0]}, {size[1]}, 3), got {images.dtype} {images.shape}"
        )


def _is_backbone(inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> bool:
    if len(inputs) != 1 or len(outputs) != 1:
        return False
    match (_shape(inputs[0]), _shape(outputs[0])):
        case ((1, _, _, 3), (1, _)):
            return bool(inputs[0]["dtype"] == np.uint8 and outputs[0]["dtype"] == np.float32)
    return False


def _shape(tensor: dict[str, Any]) -> tuple[int, ...]:
    return tuple(int(n) for n in tensor["shape"])
