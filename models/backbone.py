"""The backbones that turn pixels into features: how to build each in Keras, and its export to LiteRT.

Preprocessing is part of the network, so every backbone takes raw RGB pixels: uint8 (N, H, W, 3), 0..255, to float32
features (N, D). Importing this module imports no TensorFlow: only `build` needs Keras. The table of backbones is in
`models.architectures`.
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
# Features of VGG or of random weights reach thousands, where float32 itself resolves 1e-4: there, sums of some thousand
# products taken in another order may differ by this much of the largest feature.
MAX_RELATIVE_PARITY_ERROR = 1e-5
# Quantised features that point elsewhere than the float ones are those of a network that was calibrated on other data.
MIN_INT8_COSINE = 0.8
RECORD_FILE = "export.json"
CALIBRATION_FILE = "calibration.npy"
_LIBRARIES = ("tensorflow", "keras", "ai-edge-litert")
# An export outlives no change of the code that makes it.
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
    """A backbone on disk, as LiteRT flatbuffer and as Keras weights, and how far the two are apart.

    `parity` is the largest absolute difference of their features on photographs and seeded noise; `cosine` is the
    mean cosine between them, for int8 on the images that it was calibrated with.
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

    `weights`: `imagenet`, `random` (by `seed`: to train, to test, to time), or a file from the same architecture
    without its top: what Keras saved (`.weights.h5`, `.h5`, `.keras`) or an `.npz` of its `get_weights()` in order;
    only weights are taken from it, never code. A backbone without weights takes none. Raises ModelError for weights
    that cannot be had or do not fit.
    """
    import keras

    spec = find_backbone(name, output, input_size)
    pixels = keras.Input((*spec.input_size, 3), dtype="uint8", name="pixels")
    feature_map = build_body(spec, weights, seed)(preprocess(pixels, spec.preprocessing))
    reduce = keras.layers.GlobalAveragePooling2D if spec.output == "pooled" else keras.layers.Flatten
    return keras.Model(pixels, reduce(name="features")(feature_map), name=f"{name}_backbone")


def build_body(spec: BackboneSpec, weights: str, seed: int = RANDOM_SEED) -> "keras.Model":
    """The part of `build` between preprocessing and output: the network whose weights a weights file holds."""
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
    """What a request for weights comes to: `imagenet`, `random`, the whole path of a file, or `none` for a backbone
    that has no weights. Raises ModelError for a file that is not there or not wanted, and for ImageNet weights that
    nobody has."""
    if not spec.has_weights:
        if weights not in ("imagenet", "random", NO_WEIGHTS):
            raise ModelError(f"{spec.name} has no weights to load, leave weights out; got {weights!r}")
        return NO_WEIGHTS
    if weights == "imagenet" and spec.imagenet_identity is None:
        raise ModelError(
            f"{spec.name} has no ImageNet weights: train it with 'imagestream train-cnn', give a weights file, or ask "
            "for weights `random` by name"
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
    """Export a backbone to LiteRT, or return the export that `cache_dir` already holds.

    With `int8_calibration`, images (N, H, W, 3) uint8 such as it will see (about a hundred of the training images),
    weights and activations become 8-bit integers: a quarter of the size, twice the speed, features a little off.

    An export lies in `cache_dir/NAME-KEY/`, the key made from all that it depends on: name, weights, output, sizes,
    calibration images, library versions and this code. It appears there whole, and is made anew if its hashes no
    longer hold. The conversion runs in a process of its own, so that the caller's stays free of TensorFlow and of its
    messages; the first time takes 20 to 30 s on two cores. Raises ModelError for an unknown backbone, unusable weights
    or calibration images, or features that are too far from Keras'.
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
        _convert_apart(spec, weights, folder)
        (folder / CALIBRATION_FILE).unlink(missing_ok=True)
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


def preprocess(pixels: Any, expected: Preprocessing) -> Any:
    """Raw RGB pixels as the network expects them, by operations that every converter knows."""
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
            f"the ImageNet weights of {spec.name} could not be downloaded ({error}); give weights that were downloaded "
            "elsewhere as a local .h5 file, or ask for weights `random` by name, or take "
            f"{DEFAULT_BACKBONE}, whose weights are installed"
        ) from error


def _check_calibration(images: Images, spec: BackboneSpec) -> None:
    if images.dtype != np.uint8 or images.shape[1:] != (*spec.input_size, 3) or not len(images):
        height, width = spec.input_size
        raise ModelError(
            f"int8 is calibrated on at least one image, uint8 of shape (N, {height}, {width}, 3), "
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
    """The export in `folder`, or None if there is none whose hashes hold."""
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


def _convert_apart(spec: BackboneSpec, weights: str, folder: Path) -> None:
    """Fill `folder` with an export, by `models.convert` in a process of its own."""
    request = [spec.name, weights, str(folder), spec.output, *map(str, spec.input_size)]
    root = str(Path(__file__).parents[1])  # where `models` is found, installed or not
    start = f"import sys; sys.path.insert(0, {root!r}); from models.convert import main; main()"
    command = [sys.executable, "-P", "-c", start, *request]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", errors="replace", check=False)
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or [f"the conversion ended with code {done.returncode}"]
        raise ModelError(said[-1])
    check_agreement(spec.name, json.loads((folder / RECORD_FILE).read_text(encoding="utf-8")))


def check_agreement(name: str, record: dict[str, Any]) -> None:
    """Refuse an export whose features are not those of Keras; the comparisons also catch NaN."""
    if record["precision"] == "int8":
        if not record["cosine"] >= MIN_INT8_COSINE:
            raise ModelError(
                f"the int8 features of {name} have a cosine of {record['cosine']:.2f} to the exact ones, at least "
                f"{MIN_INT8_COSINE} is asked for; calibrate on more images, or keep float32"
            )
        return
    allowed = max(MAX_PARITY_ERROR, MAX_RELATIVE_PARITY_ERROR * record["largest"])
    if not record["parity"] <= allowed:
        raise ModelError(
            f"LiteRT and Keras disagree on the features of {name} by {record['parity']:.1e}, "
            f"at most {allowed:.0e} is allowed"
        )
