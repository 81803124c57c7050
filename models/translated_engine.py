"""The engine that runs a backbone's flatbuffer on ONNX Runtime, translated to ONNX."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from models.errors import ModelError
from models.onnx_session import OnnxSession
from models.tflite_to_onnx import to_onnx


class TranslatedEngine:
    """ONNX Runtime with the translation of a backbone's flatbuffer, one image at a time. Not thread-safe."""

    def __init__(
        self,
        flatbuffer: bytes,
        input_size: tuple[int, int],
        n_features: int,
        threads: int = 1,
        providers: Sequence[str] = ("cpu",),
    ) -> None:
        """Translate and load a flatbuffer.

        Args:
            input_size: (height, width).
            n_features: D.
            threads: the number of threads of one operator.
            providers: execution providers by priority.

        Raises:
            ModelError: it cannot be translated or run.
        """
        self._session = OnnxSession(to_onnx(flatbuffer), threads, providers)
        self.input_size, self.n_features = input_size, n_features

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Features (N, D) of `images` (N, H, W, 3), in their order; raises ModelError for another shape or dtype."""
        if images.dtype != np.uint8 or images.shape[1:] != (*self.input_size, 3):
            raise ModelError(f"expected uint8 images of size {self.input_size}, got {images.dtype} {images.shape}")
        features = np.empty((len(images), self.n_features), np.float32)
        for at in range(len(images)):
            features[at] = self._session.run(images[at : at + 1])[0]
        return features
