"""Running ONNX files with ONNX Runtime, without TensorFlow."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.errors import ModelError
from models.model_file import one_line
from models.onnx_file import read_onnx

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "directml": "DmlExecutionProvider",
}
_QUIET = 4  # fatal errors only


class OnnxSession:
    """A loaded ONNX file with one output. Not thread-safe."""

    def __init__(self, content: bytes, threads: int = 1, providers: Sequence[str] = ("cpu",)) -> None:
        """Check and load a file.

        Args:
            threads: the number of threads of one operator.
            providers: names of `PROVIDERS` by priority.

        Raises:
            ModelError: the file is rejected, or ONNX Runtime cannot run it or lacks a provider.
        """
        import onnxruntime

        read_onnx(content)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = _QUIET
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # cores are shared
        try:
            self._session = onnxruntime.InferenceSession(content, options, providers=resolve_providers(providers))
        except ModelError:
            raise
        except Exception as error:  # its own exceptions have no common base class
            raise ModelError(f"ONNX Runtime cannot run it: {one_line(error)}") from error
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        if len(inputs) != 1 or len(outputs) != 1:
            raise ModelError(f"expected one input and one output, it has {len(inputs)} and {len(outputs)}")
        self._input, self._output = inputs[0].name, outputs[0].name
        first = inputs[0].shape[0] if inputs[0].shape else None
        on_cpu = self._session.get_providers() == [PROVIDERS["cpu"]]
        # One image at a time on a CPU: activations stay in the cache, and results cannot depend on other images.
        self.batch = first if isinstance(first, int) else 1 if on_cpu else 0

    def run(self, tensor: NDArray[Any]) -> NDArray[Any]:
        """Return the output for images (N, …); raises ModelError if ONNX Runtime fails."""
        try:
            (values,) = self._session.run([self._output], {self._input: tensor})
        except Exception as error:
            raise ModelError(f"ONNX Runtime fails on an image: {one_line(error)}") from error
        if not isinstance(values, np.ndarray):
            raise ModelError(f"its output {self._output!r} is not a tensor")
        return values


def resolve_providers(providers: Sequence[str]) -> list[str]:
    """Return ONNX Runtime's names of the providers.

    Raises:
        ModelError: an unknown provider, or one that the installed ONNX Runtime lacks.
    """
    import onnxruntime

    installed = onnxruntime.get_available_providers()
    names = []
    for provider in providers:
        name = PROVIDERS.get(provider)
        if name is None:
            raise ModelError(f"an execution provider is one of {', '.join(PROVIDERS)}, got {provider!r}")
        if name not in installed:
            have = ", ".join(short for short, long in PROVIDERS.items() if long in installed)
            raise ModelError(
                f"the installed ONNX Runtime has no execution provider {provider!r}, it has {have}: install a package "
                "with it, such as onnxruntime-gpu for cuda and tensorrt, or set IMAGESTREAM_EXECUTION_PROVIDERS=cpu"
            )
        names.append(name)
    return names
