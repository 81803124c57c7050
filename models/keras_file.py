"""Keras files (`.keras`, and `.h5` of complete models): validation and conversion to a flatbuffer.

A Keras file names the classes of its layers, which Keras imports. Every name is therefore checked against an allowlist
of layers of image classifiers; layers that contain code (`Lambda`), load files or belong to another package are
rejected before Keras reads the file. Sources: `keras/src/saving/serialization_lib.py`, `saving_lib.py`.
"""

import json
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from models.errors import ModelError
from models.model_file import Contents, Tensor, one_line

MAX_CONFIG_BYTES = 32 * 1024**2
MAX_WEIGHT_BYTES = 1024**3
MAX_RATIO = 200  # of decompressed to compressed bytes
MAX_DEPTH = 200
MAX_SHOWN = 100
ZIP_MAGIC, HDF5_MAGIC = b"PK\x03\x04", b"\x89HDF\r\n\x1a\n"
_MEMBERS = ("config.json", "model.weights.h5")

_LAYERS = frozenset({
    "Activation", "ActivityRegularization", "Add", "AlphaDropout", "Attention", "Average", "AveragePooling2D",
    "AvgPool2D", "BatchNormalization", "CenterCrop", "Concatenate", "Conv2D", "Conv2DTranspose",
    "Convolution2D", "Cropping2D", "Dense", "DepthwiseConv2D", "Dot", "Dropout", "ELU", "Embedding",
    "Flatten", "Functional", "GaussianDropout", "GaussianNoise", "GlobalAveragePooling1D",
    "GlobalAveragePooling2D", "GlobalAvgPool2D", "GlobalMaxPool2D", "GlobalMaxPooling2D",
    "GroupNormalization", "Identity", "InputLayer", "LayerNormalization", "LeakyReLU", "MaxPool2D",
    "MaxPooling2D", "Maximum", "Minimum", "Model", "MultiHeadAttention", "Multiply", "Normalization", "PReLU",
    "Permute", "RandomBrightness", "RandomContrast", "RandomCrop", "RandomFlip", "RandomRotation",
    "RandomTranslation", "RandomZoom", "ReLU", "RepeatVector", "Rescaling", "Reshape", "Resizing",
    "SeparableConv2D", "SeparableConvolution2D", "Sequential", "Softmax", "SpatialDropout2D",
    "SpectralNormalization", "Subtract", "ThresholdedReLU", "UnitNormalization", "UpSampling2D",
    "ZeroPadding2D",
})  # fmt: skip
# Classes of values in a layer's description, none of which runs code from the file.
_PARTS = frozenset({"__keras_tensor__", "DTypePolicy", "Policy", "__numpy__", "__tensor__", "TensorShape", "Variable"})
_PACKAGES = tuple(
    f"keras.{name}" for name in ("initializers", "regularizers", "constraints", "activations", "dtype_policies")
)
_LEGACY_PARTS = frozenset({
    "Constant", "GlorotNormal", "GlorotUniform", "HeNormal", "HeUniform", "Identity", "L1", "L1L2", "L2",
    "LecunNormal", "LecunUniform", "MaxNorm", "MinMaxNorm", "NonNeg", "Ones", "Orthogonal", "RandomNormal",
    "RandomUniform", "TruncatedNormal", "UnitNorm", "VarianceScaling", "Zeros",
})  # fmt: skip
_TRAINING = ("compile_config", "build_config", "training_config")  # not loaded


def read_keras(path: Path) -> Contents:
    """Read and check a file without Keras.

    Raises:
        ModelError: not a Keras model, or one that would run code or claims more data than it contains.
    """
    with path.open("rb") as file:
        magic = file.read(8)
    if magic.startswith(ZIP_MAGIC):
        config = _config_of_zip(path)
    elif magic == HDF5_MAGIC:
        config = _config_of_hdf5(path)
    else:
        raise ModelError("not a Keras file: neither a zip file nor HDF5")
    found = Contents(producer="keras")
    found.operators = Counter(_check(config))
    found.inputs = list(_inputs(config))
    return found


def convert_keras(path: Path, tensor: str | None) -> tuple[bytes, str]:
    """Convert a checked file; returns the flatbuffer and the name of the output layer.

    Raises:
        ModelError: Keras cannot load the file, or LiteRT cannot run its layers.
    """
    import keras

    from models.convert import to_flatbuffer

    try:
        model = keras.models.load_model(path, compile=False, safe_mode=True)
    except Exception as error:  # of any type
        raise ModelError(f"Keras cannot load it: {one_line(error)}") from error
    if len(model.inputs) != 1 or len(model.outputs) != 1:
        raise ModelError(f"expected one input and one output, it has {len(model.inputs)} and {len(model.outputs)}")
    name = tensor or model.layers[-1].name
    if tensor is not None:
        names = [layer.name for layer in model.layers]
        if tensor not in names:
            raise ModelError(f"it has no layer {tensor!r}; the last ones are {', '.join(names[-5:])}")
        model = keras.Model(model.inputs, model.get_layer(tensor).output)
    try:
        return to_flatbuffer(model), name
    except Exception as error:
        raise ModelError(f"it cannot be converted for LiteRT: {one_line(error)}") from error


def _config_of_zip(path: Path) -> Any:
    import h5py

    try:
        with zipfile.ZipFile(path) as archive:
            sizes = {one.filename: one.file_size for one in archive.infolist()}
            if missing := [name for name in _MEMBERS if name not in sizes]:
                raise ModelError(f"not a Keras model: {missing[0]} is missing")
            total = sum(sizes.values())
            if total > min(MAX_WEIGHT_BYTES, max(1024**2, MAX_RATIO * path.stat().st_size)):
                raise ModelError(f"it unpacks to {total:,} bytes, from {path.stat().st_size:,}")
            if sizes["config.json"] > MAX_CONFIG_BYTES:
                raise ModelError(f"its config.json has {sizes['config.json']:,} bytes, at most {MAX_CONFIG_BYTES:,}")
            config = _json(archive.read("config.json"))
            with TemporaryDirectory() as scratch:  # HDF5 seeks in the file, which is slow in a zip
                weights = archive.extract("model.weights.h5", scratch)
                with h5py.File(weights, "r") as file:
                    _check_hdf5(file)
            return config
    except (zipfile.BadZipFile, OSError, RuntimeError, NotImplementedError, KeyError, ValueError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"not a valid Keras file: {one_line(error)}") from error


def _config_of_hdf5(path: Path) -> Any:
    import h5py

    try:
        with h5py.File(path, "r") as file:
            config = file.attrs.get("model_config")
            if config is None:
                raise ModelError(
                    "it contains only weights, without the layers: give --weights FILE to train with a backbone by name"
                )
            _check_hdf5(file)
            return _json(config)
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"not a valid HDF5 file: {one_line(error)}") from error


def _check_hdf5(file: Any) -> None:
    """Raise ModelError for links out of the file, and for more bytes of weights than the limit."""
    import h5py

    total = 0
    waiting, seen = [file], set()
    while waiting:
        group = waiting.pop()
        for name in group:
            link = group.get(name, getlink=True)
            if not isinstance(link, h5py.HardLink):
                raise ModelError(f"{name[:MAX_SHOWN]!r} is a link, which could lead out of the file")
            one = group[name]
            if isinstance(one, h5py.Group):
                if one.id.__hash__() not in seen:
                    seen.add(one.id.__hash__())
                    waiting.append(one)
                continue
            if one.external or one.is_virtual:
                raise ModelError(f"the weights {name[:MAX_SHOWN]!r} are in another file")
            total += one.nbytes
            if total > MAX_WEIGHT_BYTES or one.nbytes > max(1024**2, MAX_RATIO * one.id.get_storage_size()):
                taken = one.id.get_storage_size()
                raise ModelError(f"the weights {name[:MAX_SHOWN]!r} claim {one.nbytes:,} bytes and take {taken:,}")


def _json(content: bytes | str) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"its description of the layers is not JSON: {one_line(error)}") from error


def _objects(config: Any) -> Iterator[dict[str, Any]]:
    """All descriptions of objects, except those used only for training."""
    waiting = [(config, 0)]
    while waiting:
        one, depth = waiting.pop()
        if depth > MAX_DEPTH:
            raise ModelError(f"its layers are nested more than {MAX_DEPTH} levels deep")
        if isinstance(one, dict):
            if "class_name" in one:
                yield one
            waiting += [(value, depth + 1) for key, value in one.items() if key not in _TRAINING]
        elif isinstance(one, list):
            waiting += [(value, depth + 1) for value in one]


def _check(config: Any) -> Iterator[str]:
    """The names of all layers; raises ModelError for one that is not Keras' own or not in the allowlist."""
    n = 0
    for one in _objects(config):
        name, module, registered = (one.get(key) for key in ("class_name", "module", "registered_name"))
        shown = str(name)[:MAX_SHOWN]
        if registered not in {None, name} or not isinstance(name, str):
            raise ModelError(f"{str(registered)[:MAX_SHOWN]!r} is custom code, which is not run; use Keras' own layers")
        if module is not None and not f"{module}.".startswith("keras.") and (module, name) != ("builtins", "function"):
            raise ModelError(f"{shown!r} is of the module {str(module)[:MAX_SHOWN]!r}, only Keras' own are loaded")
        if name == "function":
            if not isinstance(one.get("config"), str) or not str(one["config"]).isidentifier():
                raise ModelError("it contains a custom function, which is code; use Keras' own activations")
            continue
        part = name in _PARTS or (name in _LEGACY_PARTS if module is None else str(module).startswith(_PACKAGES))
        if not part and name not in _LAYERS:
            why = (
                "runs code that is in the file" if name == "Lambda" else "is not one of those supported in classifiers"
            )
            raise ModelError(f"the layer {shown!r} {why}; it is not loaded")
        if not part:
            n += 1
            yield name
    if not n:
        raise ModelError("it describes no layers")


def _inputs(config: Any) -> Iterator[Tensor]:
    for one in _objects(config):
        if one["class_name"] == "InputLayer" and isinstance(one.get("config"), dict):
            layer = one["config"]
            shape = layer.get("batch_shape") or layer.get("batch_input_shape")
            dtype = layer.get("dtype")
            sides = tuple(int(side or 0) for side in shape) if isinstance(shape, list) else None
            yield Tensor(str(layer.get("name", "")), dtype if isinstance(dtype, str) else "float32", sides)
            return
