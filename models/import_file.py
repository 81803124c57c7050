"""Importing networks from model files.

Files are processed in a sandboxed subprocess (`models.import_work`), so that no file can exhaust the caller's memory or
time, or crash it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from models.errors import ModelError
from models.model_file import Tensor
from models.network import Network
from models.sandbox import run_sandboxed

SUFFIXES = (".onnx", ".tflite", ".keras", ".h5")
MAX_BYTES = 2 * 1024**3 - 1
TIMEOUT_S = 600  # wall clock; the limits of CPU time and memory depend on the file
SAVED_MODEL = "saved_model.pb"
INSTALLED = ("efficientnet_lite0",)  # classifiers whose weights are installed with the package


@dataclass(frozen=True)
class Inspection:
    """The content of a model file.

    Attributes:
        producer: the software that wrote the file.
        inputs, outputs: name, type and shape, in which 0 stands for a size that is not fixed.
        operators: the number of occurrences of each operator.
        parameters: the number of elements of all weights.
        bytes: the size of the file, including files with external weights.
        opsets: versions of the operators by domain.
        classes: the text with class names in the file, if any.
        guessed: the settings that an import would guess, by name.
    """

    format: str
    producer: str
    inputs: list[Tensor]
    outputs: list[Tensor]
    operators: dict[str, int]
    parameters: int
    bytes: int
    opsets: dict[str, int] = field(default_factory=dict)
    classes: str | None = None
    guessed: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Imported:
    """An imported network.

    Attributes:
        network: its entry in a manifest.
        file: the file to run.
        n_features: D.
        scores: (N, D) float32 of the sample images.
        classes: as in `Inspection`.
        size: the size of `file` in bytes.
    """

    network: Network
    file: Path
    n_features: int
    scores: Any
    guessed: dict[str, str]
    classes: str | None
    size: int


def split_tensor(name: str) -> tuple[Path, str | None]:
    """Split `FILE[:tensor]`; a colon may also be part of an existing file's name."""
    path = Path(name)
    if path.exists() or ":" not in name:
        return path, None
    file, _, tensor = name.rpartition(":")
    while tensor and not Path(file).exists() and ":" in file:  # names of tensors such as `output:0` contain colons
        file, _, rest = file.rpartition(":")
        tensor = f"{rest}:{tensor}"
    return Path(file), tensor or None


def inspect_file(path: Path) -> Inspection:
    """Describe a model file without running it.

    Raises:
        ModelError: the file does not exist, is not a model, or is rejected; the message says why.
    """
    answer = _run(path, {"task": "inspect"})
    for name in ("inputs", "outputs"):
        answer[name] = [
            Tensor(one["name"], one["dtype"], None if one["shape"] is None else tuple(one["shape"]))
            for one in answer[name]
        ]
    return Inspection(**answer)


def import_network(
    path: Path,
    into: Path,
    images: Sequence[Path],
    *,
    tensor: str | None = None,
    preset: str | None = None,
    input_size: tuple[int, int] | None = None,
    pooled: bool = False,
    changes: Mapping[str, Any] | None = None,
) -> Imported:
    """Check a model file, determine its preprocessing, convert it if needed, and run it on sample images.

    Args:
        path: the file, or the name of one of `INSTALLED`.
        into: an existing folder for the converted file.
        images: files of encoded sample images.
        tensor: the tensor whose values are the features; default: the file's only output.
        preset: a name in `models.recipe.PRESETS`; default: guessed.
        input_size: (height, width), if the file does not fix it.
        pooled: whether to average a feature map over its positions.
        changes: fields of the recipe that differ from the preset's.

    Raises:
        ModelError: the file is rejected or cannot be run, or a required argument is missing.
    """
    request = {
        "task": "import",
        "into": str(into.resolve()),
        "images": [str(image.resolve()) for image in images],
        "tensor": tensor,
        "preset": preset,
        "input_size": input_size,
        "pooled": pooled,
        "changes": dict(changes or {}),
    }
    answer = _run(path, request)
    network = Network.model_validate(answer["network"])
    return Imported(
        network,
        into / network.file,
        answer["n_features"],
        np.array(answer["scores"], np.float32),
        answer["guessed"],
        answer["classes"],
        answer["size"],
    )


def _run(path: Path, request: Mapping[str, Any]) -> Any:
    if str(path) in INSTALLED and not path.exists():
        return run_sandboxed("models.import_work", {**request, "path": str(path), "installed": True}, TIMEOUT_S)
    is_folder = path.is_dir() and (path / SAVED_MODEL).is_file()
    if not is_folder and path.suffix.lower() not in SUFFIXES:
        raise ModelError(
            f"expected a file that ends in {', '.join(SUFFIXES)}, or the folder of a SavedModel, got {path.name!r}"
        )
    if not is_folder and not path.is_file():
        raise ModelError(f"there is no file {str(path)!r}")
    size = (path / SAVED_MODEL if is_folder else path).stat().st_size
    if not 0 < size <= MAX_BYTES:
        raise ModelError(f"{path.name} has {size:,} bytes; expected from 1 to {MAX_BYTES:,}")
    try:
        return run_sandboxed("models.import_work", {**request, "path": str(path.resolve())}, TIMEOUT_S)
    except ModelError as error:
        raise ModelError(f"{path.name} is refused: {error}") from error
