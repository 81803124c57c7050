"""The sandboxed part of `models.import_file`: `python -m models.import_work`, run by `models.sandbox`.

The structure of a file is checked while its bytes are on disk. Only then are the limits raised to the memory and time
that a model of its size needs.
"""

import json
import mmap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from models import efficientnet_lite0
from models.backbone import file_sha256
from models.class_list import imagenet_names
from models.decode import BadImage, read_limited
from models.errors import ModelError
from models.import_file import Inspection
from models.keras_file import convert_keras, read_keras
from models.model_file import Contents, Tensor
from models.network import FILES, Format, Network, NetworkEngine
from models.onnx_file import extract, read_onnx
from models.recipe import Layout, Recipe, recipe_of
from models.sandbox import CPU_S, MEMORY, MIB, limit, serve_sandboxed
from models.saved_model import FILE, convert_saved_model, read_saved_model
from models.sessions import open_session
from models.tflite_file import keep_tensor, read_tflite

DEFAULT_SIDE = 224  # pixels
MEMORY_PER_BYTE, BYTES_PER_S = 5, 20 * MIB  # additional memory and time per byte of a checked model
CONVERTER_MEMORY, CONVERTER_CPU_S = 3 * 1024 * MIB, 240  # for TensorFlow and its converter
CHANNELS = (1, 3)
DTYPES = ("float32", "float16", "uint8", "int8")
MAX_CANDIDATES = 8  # tensors that an error lists
NEAR = 0.02


@dataclass(frozen=True)
class _CheckedFile:
    """A checked file.

    Attributes:
        size: in bytes, including external weights.
        prepare: the requested tensor → (format, content of the file to run, name of the tensor).
    """

    kind: str
    contents: Contents
    size: int
    prepare: Callable[[str | None], tuple[Format, bytes, str]]


def _answer(request: dict[str, Any]) -> Any:
    path = Path(request["path"])
    read = _installed() if request.get("installed") else _read(path)
    return _inspected(read) if request["task"] == "inspect" else _imported(path, read, request)


def _read(path: Path) -> _CheckedFile:
    """Check a file by its suffix, then raise the limits to what it needs."""
    readers = {".onnx": _read_onnx, ".tflite": _read_tflite, ".keras": _read_keras, ".h5": _read_keras}
    read = _read_saved_model(path) if path.is_dir() else readers[path.suffix.lower()](path)
    limit(MEMORY + MEMORY_PER_BYTE * read.size, CPU_S + read.size // BYTES_PER_S)
    return read


def _read_onnx(path: Path) -> _CheckedFile:
    with path.open("rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)  # closed when the last view is released
    found = read_onnx(memoryview(content), path.parent)

    def prepare(tensor: str | None) -> tuple[Format, bytes, str]:
        wanted = tensor or _only(found.outputs)
        return "onnx", extract(path.read_bytes(), wanted, path.parent), wanted

    size = path.stat().st_size + sum((path.parent / name).stat().st_size for name in found.external)
    return _CheckedFile("ONNX", found, size, prepare)


def _read_tflite(path: Path) -> _CheckedFile:
    with path.open("rb") as file:
        head = file.read(8)
        if head[4:8] == b"TFL3":  # otherwise it need not be read
            limit(MEMORY + path.stat().st_size, CPU_S)
            head += file.read()
    found = read_tflite(head)

    def prepare(tensor: str | None) -> tuple[Format, bytes, str]:
        wanted = tensor or _only(found.outputs)
        return "tflite", head if tensor is None else keep_tensor(head, tensor), wanted

    return _CheckedFile("TensorFlow Lite", found, len(head), prepare)


def _read_keras(path: Path) -> _CheckedFile:
    found = read_keras(path)

    def prepare(tensor: str | None) -> tuple[Format, bytes, str]:
        return "tflite", *_converted(lambda: convert_keras(path, tensor))

    return _CheckedFile("Keras", found, path.stat().st_size, prepare)


def _read_saved_model(path: Path) -> _CheckedFile:
    found = read_saved_model(path)

    def prepare(tensor: str | None) -> tuple[Format, bytes, str]:
        return "tflite", *_converted(lambda: convert_saved_model(path, tensor))

    return _CheckedFile(
        "SavedModel", found, sum(file.stat().st_size for file in path.rglob("*") if file.is_file()), prepare
    )


def _installed() -> _CheckedFile:
    """EfficientNet-Lite0 with its own head for ImageNet-1k."""

    def prepare(tensor: str | None) -> tuple[Format, bytes, str]:
        from models.convert import to_flatbuffer

        if tensor is not None:
            raise ModelError(
                "a classifier by name is imported with its head; to fit a new one, pass its name to train --backbone"
            )
        return "tflite", *_converted(lambda: (to_flatbuffer(efficientnet_lite0.build(include_top=True)), "top"))

    side = efficientnet_lite0.INPUT_SIZE[0]
    found = Contents(producer="keras", metadata={"names": json.dumps(imagenet_names())})
    found.inputs = [Tensor("scaled_pixels", "float32", (0, side, side, 3))]
    return _CheckedFile("installed", found, 0, prepare)


def _converted(convert: Callable[[], tuple[bytes, str]]) -> tuple[bytes, str]:
    limit(CONVERTER_MEMORY, CONVERTER_CPU_S)
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")
    return convert()


def _inspected(read: _CheckedFile) -> dict[str, Any]:
    found, guessed = read.contents, dict[str, str]()
    if len(found.inputs) == 1:
        _recipe(found.inputs[0], None, None, {}, guessed)
    inspection = Inspection(
        format=read.kind,
        producer=found.producer,
        inputs=found.inputs,
        outputs=found.outputs,
        operators=dict(found.operators.most_common()),
        parameters=found.parameters,
        bytes=read.size,
        opsets=found.opsets,
        classes=found.classes,
        guessed=guessed,
    )
    return asdict(inspection)


def _imported(path: Path, read: _CheckedFile, request: dict[str, Any]) -> dict[str, Any]:
    file_format, content, tensor = read.prepare(request["tensor"])
    inputs = (read_onnx(content) if file_format == "onnx" else read_tflite(content)).inputs
    if len(inputs) != 1:
        raise ModelError(f"a network for images has one input, this one has {len(inputs)}: {_listed(inputs)}")
    guessed: dict[str, str] = {}
    size = tuple(request["input_size"]) if request["input_size"] else None
    preset = "efficientnet_lite" if request.get("installed") else request["preset"]
    recipe = _recipe(inputs[0], preset, size, request["changes"], guessed)
    network = Network(
        format=file_format,
        source=path.name[:255],
        source_sha256=efficientnet_lite0.WEIGHTS_SHA256 if request.get("installed") else _sha256(path),
        tensor=tensor,
        recipe=recipe,
        layout=recipe.layout,
    )
    engine = NetworkEngine(network, "pooled" if request["pooled"] else "flat", open_session(file_format, content))
    scores = engine(np.stack([_pixels(Path(image), recipe) for image in request["images"]]))
    if not np.isfinite(scores).all():
        raise ModelError("its output for the sample images is not finite")
    (Path(request["into"]) / FILES[file_format]).write_bytes(content)
    return {
        "network": network.model_dump(mode="json"),
        "n_features": engine.n_features,
        "scores": scores.tolist(),
        "guessed": guessed,
        "classes": read.contents.classes,
        "size": len(content),
    }


def _sha256(path: Path) -> str:
    return file_sha256(path / FILE if path.is_dir() else path)


def _only(outputs: Sequence[Tensor]) -> str:
    if len(outputs) != 1:
        raise ModelError(f"it has {len(outputs)} outputs, select one as FILE:NAME: {_listed(outputs)}")
    return outputs[0].name


def _listed(tensors: Sequence[Tensor]) -> str:
    return ", ".join(repr(one.name) for one in tensors[:MAX_CANDIDATES]) or "none"


def _recipe(
    taken: Tensor,
    preset: str | None,
    input_size: tuple[int, ...] | None,
    changes: Mapping[str, Any],
    guessed: dict[str, str],
) -> Recipe:
    """The recipe for an input, from the file, the request, or a guess that is recorded in `guessed`."""
    shape = (0, 0, 0, 0) if taken.shape is None else taken.shape
    if len(shape) != 4:  # noqa: PLR2004
        raise ModelError(f"its input {taken.name!r} has the shape {list(shape)}, images have four dimensions")
    if taken.dtype not in DTYPES:
        raise ModelError(f"its input {taken.name!r} is of type {taken.dtype}, images are {', '.join(DTYPES)}")
    values = dict(changes)
    layout = values.pop("layout", None) or _layout_of(shape)
    channels, sides = (shape[1], shape[2:]) if layout == "nchw" else (shape[3], shape[1:3])
    if channels not in {0, *CHANNELS}:
        raise ModelError(f"its input has {channels} channels in the layout {layout}, pictures have 1 or 3")
    if channels == 1:
        values.setdefault("channels", "gray")
    if channels and (values.get("channels") == "gray") != (channels == 1):
        raise ModelError(f"its input has {channels} channels, --channels {values['channels']} does not match")
    size = _input_size(sides, input_size, guessed)
    if preset is None:
        preset = _preset_of(taken, layout)
        guessed["preset"] = f"{preset} (from the input: {layout}, {taken.dtype}; override with --preset)"
    # The session quantises real values with the scale in the file.
    dtype = "float32" if taken.quantization else taken.dtype
    return recipe_of(preset, size, layout=layout, dtype=dtype, **values)


def _preset_of(taken: Tensor, layout: Layout) -> str:
    """Guess a preset by the range of a quantised input, or by the framework that typically uses the layout."""
    if taken.quantization is None:
        return "raw" if taken.dtype == "uint8" else "torchvision" if layout == "nchw" else "minus1to1"
    scale, zero = taken.quantization
    limits = np.iinfo(taken.dtype)
    low, high = (scale * (limit_ - zero) for limit_ in (limits.min, limits.max))
    for name, (want_low, want_high) in {"zero_to_one": (0, 1), "minus1to1": (-1, 1), "raw": (0, 255)}.items():
        if max(abs(low - want_low), abs(high - want_high)) <= NEAR * (want_high - want_low):
            return name
    return "torchvision"


def _input_size(sides: Sequence[int], wanted: tuple[int, ...] | None, guessed: dict[str, str]) -> tuple[int, int]:
    """(height, width), given the sides in the file, with 0 for one that is not fixed."""
    if wanted is None:
        wanted = tuple(side or DEFAULT_SIDE for side in sides)
        if not all(sides):
            guessed["input size"] = f"{wanted[0]}×{wanted[1]} (not fixed by the file; override with --input-size)"
    height, width = wanted
    if any(side not in {0, want} for side, want in zip(sides, wanted, strict=True)):
        raise ModelError(f"its input is {sides[0]}×{sides[1]} pixels (0: not fixed), got {height}×{width}")
    return height, width


def _layout_of(shape: Sequence[int]) -> Layout:
    if shape[3] in CHANNELS and shape[1] not in CHANNELS:
        return "nhwc"
    if shape[1] in CHANNELS:
        return "nchw"
    raise ModelError(f"its input has the shape {list(shape)} (0: not fixed): set --layout nhwc or nchw")


def _pixels(path: Path, recipe: Recipe) -> Any:
    pixels = recipe.pixels(read_limited(path))
    if isinstance(pixels, BadImage):
        raise ModelError(f"the sample image {path.name} cannot be decoded: {pixels.detail}")
    return pixels


if __name__ == "__main__":
    serve_sandboxed(_answer)
