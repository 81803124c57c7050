"""The backbones that turn pixels into features: one table, how to build each in Keras, and its export to LiteRT.

Preprocessing is part of the network, so every backbone takes raw RGB pixels: uint8 (N, H, W, 3), 0..255, to float32
features (N, D). Importing this module imports no TensorFlow: workers read the table, only `build` needs Keras.
"""

import hashlib
import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.metadata import version
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

from models import efficientnet_lite0
from models.errors import ModelError

if TYPE_CHECKING:
    import keras

FLATBUFFER_FILE = "backbone.tflite"
WEIGHTS_FILE = "backbone.weights.h5"
MAX_PARITY_ERROR = 1e-3
RANDOM_SEED = 0
RECORD_FILE = "export.json"
_LIBRARIES = ("tensorflow", "keras", "ai-edge-litert")
_EXPORTING_MODULES = ("backbone", "convert", "efficientnet_lite0")  # an export outlives no change of its code
_WEIGHT_SUFFIXES = (".h5", ".hdf5", ".keras")

# Given None or "imagenet", the network from preprocessed pixels to pooled features.
BodyBuilder = Callable[[Literal["imagenet"] | None], "keras.Model"]


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """What a network expects of a pixel value p in 0..255: p * scale + offset."""

    scale: float
    offset: float


@dataclass(frozen=True, slots=True)
class BackboneSpec:
    """One row of the table. `imagenet_identity` changes whenever the weights called `imagenet` do."""

    name: str
    input_size: tuple[int, int]  # (height, width)
    n_features: int
    preprocessing: Preprocessing
    build_body: BodyBuilder
    imagenet_identity: str


@dataclass(frozen=True, slots=True)
class ExportedBackbone:
    """A backbone on disk, as LiteRT flatbuffer and as Keras weights, and how far the two are apart.

    `parity` is the largest absolute difference of their features on photographs and seeded noise.
    """

    spec: BackboneSpec
    weights: str
    flatbuffer: Path
    keras_weights: Path
    sha256: str  # of the flatbuffer: the identity of the features
    parity: float


def _build_mobilenet_v2(weights: Literal["imagenet"] | None) -> "keras.Model":
    from keras.applications import MobileNetV2

    return MobileNetV2(input_shape=(224, 224, 3), include_top=False, pooling="avg", weights=weights)


def _build_efficientnet_lite0(weights: Literal["imagenet"] | None) -> "keras.Model":
    return efficientnet_lite0.build(weights=weights)


DEFAULT_BACKBONE = "efficientnet_lite0"
BACKBONES: dict[str, BackboneSpec] = {
    spec.name: spec
    for spec in (
        BackboneSpec(
            name=DEFAULT_BACKBONE,
            input_size=efficientnet_lite0.INPUT_SIZE,
            n_features=efficientnet_lite0.N_FEATURES,
            preprocessing=Preprocessing(scale=1 / 128, offset=-127 / 128),
            build_body=_build_efficientnet_lite0,
            imagenet_identity=efficientnet_lite0.WEIGHTS_SHA256,
        ),
        BackboneSpec(
            name="mobilenet_v2",
            input_size=(224, 224),
            n_features=1280,
            preprocessing=Preprocessing(scale=1 / 127.5, offset=-1.0),
            build_body=_build_mobilenet_v2,
            imagenet_identity="keras.applications",
        ),
    )
}


def find_backbone(name: str) -> BackboneSpec:
    """The table's row for `name`; raises ModelError that lists the known names."""
    if name in BACKBONES:
        return BACKBONES[name]
    close = get_close_matches(name.lower().replace("-", "_"), BACKBONES, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise ModelError(f"unknown backbone {name!r}, known are {', '.join(BACKBONES)}{hint}")


def build(name: str, weights: str = "imagenet") -> "keras.Model":
    """Build a backbone in Keras: uint8 (N, H, W, 3) to float32 (N, D), preprocessing included.

    `weights`: `imagenet`, `random` (seeded, for tests and timing), or a file that Keras saved from the same
    architecture without its top (`.weights.h5`, `.h5`, `.keras`); only weights are taken from it, never code.
    Raises ModelError for weights that cannot be had or do not fit.
    """
    import keras

    spec = find_backbone(name)
    pixels = keras.Input((*spec.input_size, 3), dtype="uint8", name="pixels")
    scaled = keras.layers.Rescaling(spec.preprocessing.scale, spec.preprocessing.offset, name="preprocessing")(pixels)
    return keras.Model(pixels, build_body(spec, weights)(scaled), name=f"{name}_backbone")


def build_body(spec: BackboneSpec, weights: str) -> "keras.Model":
    """The part of `build` behind the preprocessing: the network whose weights a weights file holds."""
    if weights == "imagenet":
        return _build_pretrained(spec)
    body = spec.build_body(None)
    if weights == "random":
        _randomise(body)
        return body
    _load_weights(spec, body, _local_weights(weights))
    return body


def export_backbone(name: str, weights: str, cache_dir: Path) -> ExportedBackbone:
    """Export a backbone to LiteRT, or return the export that `cache_dir` already holds.

    An export lies in `cache_dir/NAME-KEY/`, the key made from name, weights, library versions and this code. It appears
    there whole, and is made anew if its hashes no longer hold. The conversion runs in a process of its own, so that
    the caller's stays free of TensorFlow and of its messages; the first time takes 20 to 30 s on two cores. Raises
    ModelError for an unknown backbone, unusable weights, or features that differ from Keras' by more than 1e-3.
    """
    spec = find_backbone(name)
    if weights not in ("imagenet", "random"):
        weights = str(_local_weights(weights))
    cache_dir = cache_dir.resolve()
    target = cache_dir / f"{name}-{_export_key(spec, weights)}"
    if (found := _read_export(spec, weights, target)) is not None:
        return found
    cache_dir.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".export-", dir=cache_dir) as staging:
        folder = Path(staging) / target.name
        folder.mkdir()
        _convert_apart(name, weights, folder)
        shutil.rmtree(target, ignore_errors=True)
        try:
            folder.rename(target)
        except OSError:  # another process was faster; what it left is checked below
            if not target.is_dir():
                raise
    exported = _read_export(spec, weights, target)
    if exported is None:
        raise ModelError(f"the export of {name} in {target} was damaged while it was made; try again")
    return exported


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _build_pretrained(spec: BackboneSpec) -> "keras.Model":
    try:
        return spec.build_body("imagenet")
    except ModelError:
        raise
    except Exception as error:  # Keras raises a bare Exception when a download fails
        raise ModelError(
            f"the ImageNet weights of {spec.name} could not be downloaded ({error}); give weights that were downloaded "
            "elsewhere as a local .h5 file, or ask for weights `random` by name, or take "
            f"{DEFAULT_BACKBONE}, whose weights are installed"
        ) from error


def _randomise(body: "keras.Model") -> None:
    """He-normal kernels from a fixed seed; normalisations stay the identity. Keras' global seed is left alone."""
    import numpy as np

    generator = np.random.default_rng(RANDOM_SEED)
    for weight in body.weights:
        if len(weight.shape) > 1:
            inputs = prod(weight.shape[:2]) if "depthwise" in weight.path else prod(weight.shape[:-1])
            weight.assign(generator.normal(0.0, (2.0 / inputs) ** 0.5, weight.shape))


def _load_weights(spec: BackboneSpec, body: "keras.Model", file: Path) -> None:
    """Load `file` into `body`; raises ModelError unless it sets every single weight."""
    import numpy as np

    # Keras only warns of layers that it finds nothing for; whatever it leaves alone stays NaN and is found out.
    body.set_weights([np.full(weight.shape, np.nan, np.float32) for weight in body.weights])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            body.load_weights(file)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"the weights in {file} do not fit {spec.name} without its top: {reason}") from error
    unset = [weight.path for weight in body.weights if not np.isfinite(weight).all()]
    if unset:
        raise ModelError(
            f"the weights in {file} do not fit {spec.name} without its top: "
            f"{len(unset)} of {len(body.weights)} are missing or not finite, {unset[0]} among them"
        )


def _local_weights(weights: str) -> Path:
    file = Path(weights)
    if not file.is_file():
        raise ModelError(f"weights must be imagenet, random or a file, and there is no file {weights!r}")
    if file.suffix not in _WEIGHT_SUFFIXES:
        raise ModelError(f"a weights file ends in one of {', '.join(_WEIGHT_SUFFIXES)}, got {file.name!r}")
    return file.resolve()


def _export_key(spec: BackboneSpec, weights: str) -> str:
    if weights == "imagenet":
        identity = spec.imagenet_identity
    else:
        identity = f"seed {RANDOM_SEED}" if weights == "random" else file_sha256(Path(weights))
    code = [file_sha256(Path(__file__).with_name(f"{module}.py")) for module in _EXPORTING_MODULES]
    facts = [spec.name, identity, [version(library) for library in _LIBRARIES], code]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _read_export(spec: BackboneSpec, weights: str, folder: Path) -> ExportedBackbone | None:
    """The export in `folder`, or None if there is none whose hashes hold."""
    flatbuffer, keras_weights = folder / FLATBUFFER_FILE, folder / WEIGHTS_FILE
    try:
        record: dict[str, Any] = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
        parity, hashes = float(record["parity"]), record["sha256"]
        if hashes != {file.name: file_sha256(file) for file in (flatbuffer, keras_weights)}:
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return ExportedBackbone(spec, weights, flatbuffer, keras_weights, hashes[FLATBUFFER_FILE], parity)


def _convert_apart(name: str, weights: str, folder: Path) -> None:
    """Fill `folder` with an export, by `models.convert` in a process of its own."""
    command = [sys.executable, "-m", "models.convert", name, weights, str(folder)]
    root = Path(__file__).parents[1]  # where `models` is found, installed or not
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or [f"the conversion ended with code {done.returncode}"]
        raise ModelError(said[-1])
    result = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
    if not result["parity"] <= MAX_PARITY_ERROR:
        raise ModelError(
            f"LiteRT and Keras disagree on the features of {name} by {result['parity']:.1e}, "
            f"at most {MAX_PARITY_ERROR:.0e} is allowed"
        )
