"""Building backbones in Keras and exporting them to LiteRT.

Preprocessing is part of the network: every backbone maps raw RGB pixels, uint8 (N, H, W, 3) in 0..255, to float32
features (N, D). Importing this module does not import TensorFlow: only `build` needs Keras. The table of backbones is
in `models.architectures`.
"""

import hashlib
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from models.architectures import (
    BACKBONES,
    DEFAULT_BACKBONE,
    BackboneSpec,
    Output,
    Preprocessing,
    Size,
    find_backbone,
)
from models.errors import ModelError
from models.weights import RANDOM_SEED, load, local_file, randomise

if TYPE_CHECKING:
    import keras

__all__ = [
    "BACKBONES",
    "DEFAULT_BACKBONE",
    "BackboneSpec",
    "ExportedBackbone",
    "Preprocessing",
    "build",
    "build_body",
    "export_backbone",
    "file_sha256",
    "find_backbone",
]

FLATBUFFER_FILE = "backbone.tflite"
WEIGHTS_FILE = "backbone.weights.h5"
MAX_PARITY_ERROR = 1e-3
# Features of VGG or of random weights reach thousands, where float32 resolves 1e-4: summing thousands of products in
# another order may change a feature by this share of the largest one.
MAX_RELATIVE_PARITY_ERROR = 1e-5
# A lower cosine between quantised and float features indicates unsuitable calibration images.
MIN_INT8_COSINE = 0.8
RECORD_FILE = "export.json"
CALIBRATION_FILE = "calibration.npy"
_LIBRARIES = ("tensorflow", "keras", "ai-edge-litert")
# A change of this code invalidates cached exports.
_EXPORTING_MODULES = (
    "architectures",
    "backbone",
    "convert",
    "efficientnet_lite0",
    "quantization",
    "small_cnn",
    "weights",
)
NO_WEIGHTS = "none"

Precision = Literal["float32", "int8"]
Images = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class ExportedBackbone:
    """A backbone exported as a LiteRT flatbuffer and as Keras weights, and how closely the two agree.

    `parity` is the largest absolute difference of their features on photographs and seeded noise; `cosine` is the
    mean cosine similarity of their features, for int8 on the calibration images.
    """

    spec: BackboneSpec
    weights: str
    flatbuffer: Path
    keras_weights: Path
    sha256: str  # of the flatbuffer: the identity of the features
    parity: float
    precision: Precision = "float32"
    cosine: float = 1.0


def build(
    name: str,
    weights: str = "imagenet",
    *,
    output: Output = "pooled",
    input_size: Size | None = None,
    seed: int = RANDOM_SEED,
) -> "keras.Model":
    """Build a backbone in Keras: uint8 (N, H, W, 3) to float32 (N, D), preprocessing included.

    Args:
        name: the backbone.
        weights: `imagenet`, `random`, or a file of the same architecture without its top: `.weights.h5`, `.h5` or
            `.keras` saved by Keras, or an `.npz` of `get_weights()` in order. Only weights are read from it, no code.
        output: `pooled` or `flat`.
        input_size: (height, width); default: that of the table.
        seed: of random weights.

    Raises:
        ModelError: the weights are not available or do not fit.
    """
    spec = find_backbone(name, output, input_size)
    return with_ends(spec, build_body(spec, weights, seed))


def with_ends(spec: BackboneSpec, body: "keras.Model") -> "keras.Model":
    """Add preprocessing and output to the body of a backbone: uint8 (N, H, W, 3) to float32 (N, D)."""
    import keras

    pixels = keras.Input((*spec.input_size, 3), dtype="uint8", name="pixels")
    feature_map = body(preprocess(pixels, spec.preprocessing))
    reduce = keras.layers.GlobalAveragePooling2D if spec.output == "pooled" else keras.layers.Flatten
    return keras.Model(pixels, reduce(name="features")(feature_map), name=f"{spec.name}_backbone")


def build_body(spec: BackboneSpec, weights: str, seed: int = RANDOM_SEED) -> "keras.Model":
    """Build the part of a backbone between preprocessing and output, to which weights files apply."""
    if not spec.has_weights:
        return spec.build_map(None, spec.input_size)
    weights = resolve_weights(spec, weights)
    if weights == "imagenet":
        return _build_pretrained(spec)
    body = spec.build_map(None, spec.input_size)
    if weights == "random":
        randomise(body, seed)
    else:
        load(body, Path(weights), spec.name)
    return body


def resolve_weights(spec: BackboneSpec, weights: str) -> str:
    """Resolve `weights` to `imagenet`, `random`, the absolute path of a file, or `none` for a backbone without weights.

    Raises:
        ModelError: the file does not exist, or the backbone has no weights or no ImageNet weights.
    """
    if not spec.has_weights:
        if weights not in ("imagenet", "random", NO_WEIGHTS):
            raise ModelError(f"{spec.name} has no weights to load: omit the option; got {weights!r}")
        return NO_WEIGHTS
    if weights == "imagenet" and spec.imagenet_identity is None:
        raise ModelError(
            f"{spec.name} has no ImageNet weights: train it with 'imagestream train-cnn', or set a weights file or "
            "`random`"
        )
    return weights if weights in ("imagenet", "random") else str(local_file(weights))


def export_backbone(
    name: str,
    weights: str,
    cache_dir: Path,
    *,
    output: Output = "pooled",
    input_size: Size | None = None,
    int8_calibration: Images | None = None,
) -> ExportedBackbone:
    """Export a backbone to LiteRT, or return the cached export.

    An export is kept in `cache_dir/NAME-KEY/`; the key covers name, weights, output, size, calibration images, library
    versions and this code. It is created atomically, and again if its hashes no longer match. The conversion runs in a
    subprocess, which keeps TensorFlow and its messages out of the caller's; it takes about ten seconds.

    Args:
        name: the backbone.
        weights: as for `build`.
        cache_dir: the folder of exports.
        output: `pooled` or `flat`.
        input_size: (height, width); default: that of the table.
        int8_calibration: (N, H, W, 3) uint8, about a hundred training images. Weights and activations are then
            quantised to 8-bit integers: a quarter of the size and twice the speed, with slightly different features.

    Raises:
        ModelError: an unknown backbone, unusable weights or calibration images, or features that differ too much from
            those of Keras.
    """
    spec = find_backbone(name, output, input_size)
    weights = resolve_weights(spec, weights)
    if int8_calibration is not None:
        _check_calibration(int8_calibration, spec)
    cache_dir = cache_dir.resolve()
    target = cache_dir / f"{name}-{_export_key(spec, weights, int8_calibration)}"
    if (found := _read_export(spec, weights, target)) is not None:
        return found
    cache_dir.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".export-", dir=cache_dir) as staging:
        folder = Path(staging) / target.name
        folder.mkdir()
        if int8_calibration is not None:
            np.save(folder / CALIBRATION_FILE, int8_calibration, allow_pickle=False)
        _convert_in_subprocess(spec, weights, folder)
        check_agreement(name, json.loads((folder / RECORD_FILE).read_text(encoding="utf-8")))
        (folder / CALIBRATION_FILE).unlink(missing_ok=True)
        shutil.rmtree(target, ignore_errors=True)
        try:
            folder.rename(target)
        except OSError:  # another process was faster; its export is checked below
            if not target.is_dir():
                raise
    exported = _read_export(spec, weights, target)
    if exported is None:
        raise ModelError(f"the export of {name} in {target} was damaged while it was written; try again")
    return exported


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def preprocess(pixels: Any, expected: Preprocessing) -> Any:
    """Scale raw RGB pixels as the network expects, with operations that every converter supports."""
    import keras

    if expected.channel_order == "bgr":
        pixels = keras.ops.flip(pixels, axis=-1)
    means = expected.channel_means
    offset = [expected.offset - mean for mean in means] if any(means) else expected.offset
    return keras.layers.Rescaling(expected.scale, offset, name="preprocessing")(pixels)


def _build_pretrained(spec: BackboneSpec) -> "keras.Model":
    try:
        return spec.build_map("imagenet", spec.input_size)
    except ModelError:
        raise
    except Exception as error:  # Keras raises a bare Exception when a download fails
        raise ModelError(
            f"the ImageNet weights of {spec.name} could not be downloaded ({error}); set a local .h5 file that was "
            f"downloaded elsewhere, or `random`, or use {DEFAULT_BACKBONE}, whose weights are installed"
        ) from error


def _check_calibration(images: Images, spec: BackboneSpec) -> None:
    if images.dtype != np.uint8 or images.shape[1:] != (*spec.input_size, 3) or not len(images):
        height, width = spec.input_size
        raise ModelError(
            f"int8 calibration: expected at least one image, uint8 of shape (N, {height}, {width}, 3), "
            f"got {images.dtype} {images.shape}"
        )


def _export_key(spec: BackboneSpec, weights: str, calibration: Images | None) -> str:
    known = {"imagenet": spec.imagenet_identity, "random": f"seed {RANDOM_SEED}", NO_WEIGHTS: NO_WEIGHTS}
    identity = known[weights] if weights in known else file_sha256(Path(weights))
    code = [file_sha256(Path(__file__).with_name(f"{module}.py")) for module in _EXPORTING_MODULES]
    calibrated = None if calibration is None else hashlib.sha256(calibration.tobytes()).hexdigest()
    libraries = [version(library) for library in _LIBRARIES]
    facts = [spec.name, identity, spec.output, spec.input_size, calibrated, libraries, code]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _read_export(spec: BackboneSpec, weights: str, folder: Path) -> ExportedBackbone | None:
    """The export in `folder`, or None if it is missing or its hashes do not match."""
    flatbuffer, keras_weights = folder / FLATBUFFER_FILE, folder / WEIGHTS_FILE
    try:
        record: dict[str, Any] = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
        hashes, parity, cosine = record["sha256"], float(record["parity"]), float(record["cosine"])
        precision: Precision = "int8" if record["precision"] == "int8" else "float32"
        if hashes != {file.name: file_sha256(file) for file in (flatbuffer, keras_weights)}:
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    sha256 = hashes[FLATBUFFER_FILE]
    return ExportedBackbone(spec, weights, flatbuffer, keras_weights, sha256, parity, precision, cosine)


def _convert_in_subprocess(spec: BackboneSpec, weights: str, folder: Path) -> None:
    """Write an export into `folder` by running `models.convert` in a subprocess."""
    request = [spec.name, weights, str(folder), spec.output, *map(str, spec.input_size)]
    root = str(Path(__file__).parents[1])  # the folder of the package `models`, installed or not
    start = f"import sys; sys.path.insert(0, {root!r}); from models.convert import main; main()"
    command = [sys.executable, "-P", "-c", start, *request]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", errors="replace", check=False)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"the conversion exited with code {done.returncode}"]
        raise ModelError(lines[-1])


def check_agreement(name: str, record: dict[str, Any]) -> None:
    """Raise ModelError if the features of an export differ from those of Keras; the comparisons also catch NaN."""
    if record["precision"] == "int8":
        if not record["cosine"] >= MIN_INT8_COSINE:
            raise ModelError(
                f"the int8 features of {name} have a cosine similarity of {record['cosine']:.2f} to the float32 ones, "
                f"at least {MIN_INT8_COSINE} is required: calibrate on more images, or use float32"
            )
        return
    allowed = max(MAX_PARITY_ERROR, MAX_RELATIVE_PARITY_ERROR * record["largest"])
    if not record["parity"] <= allowed:
        raise ModelError(
            f"LiteRT and Keras disagree on the features of {name} by {record['parity']:.1e}, the limit is {allowed:.0e}"
        )
