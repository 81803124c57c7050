"""Opening sessions that run imported networks."""

from collections.abc import Sequence

from models.network import Format, Session
from models.onnx_session import OnnxSession
from models.tflite_session import TFLiteSession


def open_session(file_format: Format, content: bytes, threads: int = 1, providers: Sequence[str] = ("cpu",)) -> Session:
    """Check and load a network; `providers` are execution providers of ONNX Runtime by priority.

    Raises:
        ModelError: the file is rejected or cannot be run.
    """
    if file_format == "onnx":
        return OnnxSession(content, threads, providers)
    return TFLiteSession(content, threads)
