"""Make a network of a model's file: what it is, what it takes and gives, and the file that is run.

Both functions do their work in a process of its own (`models.import_work`), so that no file can take the memory, the
time or the process of whoever asks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from models.apart import run_apart
from models.errors import ModelError
from models.model_file import Tensor
from models.network import Network

SUFFIXES = (".onnx", ".tflite", ".keras", ".h5")
MAX_BYTES = 2 * 1024**3 - 1
TIMEOUT_S = 600  # on the clock; CPU time and memory are limited by what is in the file
SAVED_MODEL = "saved_model.pb"
INSTALLED = ("efficientnet_lite0",)  # classifiers whose weights are installed with the package


@dataclass(frozen=True)
class Inspection:
    """What a file says of itself, and what is guessed.

    Attributes:
        inputs, outputs: name, type, and shape, in which a size that is not fixed is 0.
        operators: how often each occurs.
        parameters: number of elements of all weights.
        bytes: of the file, and of files with weights beside it.
        classes: the text in which the file names its classes, None if it does not.
        guessed: what an import would take for granted.
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
    """A network that was imported.

    Attributes:
        file: what is run, in the folder that was given.
        n_features: D.
        scores: (N, D) float32 of the sample images.
        guessed: what was taken for granted, by name.
        classes: as in `Inspection`.
    """

    network: Network
    file: Path
    n_features: int
    scores: Any
    guessed: dict[str, str]
    classes: str | None
    size: int


def split_tensor(name: str) -> tuple[Path, str | None]:
    """`FILE[:tensor]`; a file whose name holds a colon is taken as it is."""
    path = Path(name)
    if path.exists() or ":" not in name:
        return path, None
    file, _, tensor = name.rpartition(":")
    while tensor and not Path(file).exists() and ":" in file:  # names of tensors such as `output:0` have colons, too
        file, _, rest = file.rpartition(":")
        tensor = f"{rest}:{tensor}"
    return Path(file), tensor or None


def inspect_file(path: Path) -> Inspection:
    """What is in a model's file; nothing is run.

    Raises:
        ModelError: no such file, not a model, or one that would be refused; says why.
    """
    answer = _apart(path, {"task": "inspect"})
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
    """Check a model's file, find out how it is to be fed, make the file that is run, and run it on sample images.

    In place of a file, one of the classifiers `INSTALLED`, by its name.

    Args:
        into: an existing folder for the file.
        images: encoded sample images, in files.
        tensor: whose values are wanted; without it the file's only output.
        preset: of `models.recipe.PRESETS`; guessed without it.
        input_size: (height, width), where the file does not fix it.
        pooled: whether a map is averaged over its places.
        changes: fields of the recipe that differ from the preset's.

    Raises:
        ModelError: the file is refused or cannot be run, or something has to be said that it does not say itself.
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
    answer = _apart(path, request)
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


def _apart(path: Path, request: Mapping[str, Any]) -> Any:
    if str(path) in INSTALLED and not path.exists():
        return run_apart("models.import_work", {**request, "path": str(path), "installed": True}, TIMEOUT_S)
    is_folder = path.is_dir() and (path / SAVED_MODEL).is_file()
    if not is_folder and path.suffix.lower() not in SUFFIXES:
        raise ModelError(
            f"a model is a file that ends in {', '.join(SUFFIXES)}, or the folder of a SavedModel, got {path.name!r}"
        )
    if not is_folder and not path.is_file():
        raise ModelError(f"there is no file {str(path)!r}")
    size = (path / SAVED_MODEL if is_folder else path).stat().st_size
    if not 0 < size <= MAX_BYTES:
        raise ModelError(f"{path.name} has {size:,} bytes; a model has from 1 to {MAX_BYTES:,}")
    try:
        return run_apart("models.import_work", {**request, "path": str(path.resolve())}, TIMEOUT_S)
    except ModelError as error:
        raise ModelError(f"{path.name} is refused: {error}") from error
