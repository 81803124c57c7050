"""Open the session that runs an imported network's file."""

from collections.abc import Sequence

from models.network import Format, Session
from models.onnx_session import OnnxSession
from models.tflite_session import TFLiteSession


def open_session(file_format: Format, content: bytes, threads: int = 1, providers: Sequence[str] = ("cpu",)) -> Session:
    """Check and load the content of a file.

    Args:
        providers: of ONNX Runtime; the first that can runs the network.

    Raises:
        ModelError: it is refused, or cannot be run.
    """
    if file_format == "onnx":
        return OnnxSession(content, threads, providers)
    return TFLiteSession(content, threads)
