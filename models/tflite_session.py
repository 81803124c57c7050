"""Running imported TensorFlow Lite files with LiteRT (XNNPACK), without TensorFlow."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.engine import without_native_log
from models.errors import ModelError
from models.model_file import one_line
from models.tflite_file import read_tflite


class TFLiteSession:
    """A loaded file with one input and one output, run on one image at a time. Not thread-safe.

    Quantised inputs and outputs are converted from and to real values by their scale and zero point.
    """

    batch = 1

    def __init__(self, content: bytes, threads: int = 1) -> None:
        """Raises ModelError if the file is rejected or LiteRT cannot run it."""
        from ai_edge_litert.interpreter import Interpreter

        read_tflite(content)
        try:
            with without_native_log():
                self._interpreter = Interpreter(model_content=content, num_threads=threads)
        except (ValueError, RuntimeError) as error:
            raise ModelError(f"LiteRT cannot run it: {one_line(error)}") from error
        inputs, outputs = self._interpreter.get_input_details(), self._interpreter.get_output_details()
        if len(inputs) != 1 or len(outputs) != 1:
            raise ModelError(f"expected one input and one output, it has {len(inputs)} and {len(outputs)}")
        self._input, self._output = inputs[0], outputs[0]["index"]
        self._shape: tuple[int, ...] | None = None

    def run(self, tensor: NDArray[Any]) -> NDArray[Any]:
        """Return the output for one image (1, …); raises ModelError if LiteRT fails."""
        place = self._input["index"]
        try:
            if self._shape != tensor.shape:
                with without_native_log():
                    self._interpreter.resize_tensor_input(place, tensor.shape)
                    self._interpreter.allocate_tensors()
                self._shape = tensor.shape
            self._interpreter.set_tensor(place, _quantised(tensor, self._input))
            self._interpreter.invoke()
            values = self._interpreter.get_tensor(self._output)
        except (ValueError, RuntimeError) as error:
            raise ModelError(f"LiteRT fails on an image: {one_line(error)}") from error
        scale, zero = self._interpreter.get_output_details()[0]["quantization"]
        if scale:
            values = (values.astype(np.float32) - zero) * np.float32(scale)
        return np.asarray(values)


def _quantised(tensor: NDArray[Any], details: dict[str, Any]) -> NDArray[Any]:
    scale, zero = details["quantization"]
    dtype = np.dtype(details["dtype"])
    if not scale or tensor.dtype == dtype:
        return tensor.astype(dtype, copy=False)
    limits = np.iinfo(dtype)
    quantised: NDArray[Any] = np.clip(np.rint(tensor / scale) + zero, limits.min, limits.max).astype(dtype)
    return quantised
