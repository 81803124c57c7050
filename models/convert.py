"""Conversion of a backbone to LiteRT in a subprocess: `python -m models.convert NAME WEIGHTS FOLDER OUTPUT H W`.

Writes the flatbuffer, the Keras weights and a record (hashes, agreement) into FOLDER; calibration images in FOLDER
select int8. If it fails, the last line on standard error is the reason.
"""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from models.architectures import Output, find_backbone
from models.backbone import (
    CALIBRATION_FILE,
    FLATBUFFER_FILE,
    RECORD_FILE,
    WEIGHTS_FILE,
    build_body,
    file_sha256,
    with_ends,
)
from models.engine import KerasEngine, LiteRTEngine
from models.errors import ModelError
from models.quantization import mean_cosine

if TYPE_CHECKING:
    import keras

_MAX_COMPARED = 32  # calibration images on which int8 is compared with Keras


def convert(
    name: str, weights: str, folder: Path, output: Output = "pooled", input_size: tuple[int, int] | None = None
) -> None:
    """Export a backbone into `folder`.

    Args:
        name: the backbone.
        weights: as for `models.backbone.build`.
        folder: empty, except for calibration images for int8.
        output: `pooled` or `flat`.
        input_size: (height, width); default: that of the table.
    """
    spec = find_backbone(name, output, input_size)
    body = build_body(spec, weights)
    body.save_weights(folder / WEIGHTS_FILE)
    model = with_ends(spec, body)
    images = comparison_images(spec.input_size)
    calibration = None
    if (folder / CALIBRATION_FILE).is_file():
        calibration = np.load(folder / CALIBRATION_FILE, allow_pickle=False)
        images = calibration[:_MAX_COMPARED]
    flatbuffer = to_flatbuffer(model, calibration)
    (folder / FLATBUFFER_FILE).write_bytes(flatbuffer)
    reference, features = KerasEngine(model)(images), LiteRTEngine(flatbuffer)(images)
    record = {
        "precision": "float32" if calibration is None else "int8",
        "parity": float(np.abs(reference - features).max()),
        "largest": float(np.abs(reference).max()),
        "cosine": mean_cosine(reference, features),
        "sha256": {file: file_sha256(folder / file) for file in (FLATBUFFER_FILE, WEIGHTS_FILE)},
    }
    (folder / RECORD_FILE).write_text(json.dumps(record), encoding="utf-8")


def to_flatbuffer(model: "keras.Model", calibration: NDArray[np.uint8] | None = None) -> bytes:
    """Convert a Keras model to a flatbuffer.

    The converter receives the traced network with its weights as constants: writing, reading and converting a
    SavedModel takes several times the CPU time.

    Args:
        model: the model, with one input.
        calibration: (N, H, W, 3) uint8; weights (per channel) and activations (per tensor, with the ranges on these
            images) are then quantised to int8, while input and output keep their types.
    """
    import tensorflow as tf

    def samples() -> Iterator[list[NDArray[np.uint8]]]:
        for image in calibration if calibration is not None else ():
            yield [image[np.newaxis]]

    (given,) = model.inputs
    signature = [tf.TensorSpec(given.shape, given.dtype, given.name)]
    traced = tf.function(lambda images: model(images, training=False), signature, autograph=False)
    converter = tf.lite.TFLiteConverter.from_concrete_functions([traced.get_concrete_function()], model)
    converter.experimental_lower_to_saved_model = False
    converter.exclude_conversion_metadata = True
    if calibration is not None:
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.representative_dataset = samples
        # Float operations are needed at both ends, for scaling pixels and returning features.
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8, tf.lite.OpsSet.TFLITE_BUILTINS]
    flatbuffer: bytes = converter.convert()
    return flatbuffer


def comparison_images(size: tuple[int, int]) -> NDArray[np.uint8]:
    """Two photographs, seeded noise, black and white: uint8 (5, H, W, 3)."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    height, width = size
    photographs = [np.asarray(Image.fromarray(image).resize((width, height))) for image in load_sample_images().images]
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    return np.stack([*photographs, noise, np.zeros_like(noise), np.full_like(noise, 255)])


def main() -> None:
    """The entry point of the subprocess."""
    name, weights, folder, output, height, width = sys.argv[1:]
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # before TensorFlow is imported
    try:
        import tensorflow as tf

        tf.config.set_visible_devices([], "GPU")  # whose reduced precision would distort the comparison
        convert(name, weights, Path(folder), "flat" if output == "flat" else "pooled", (int(height), int(width)))
    except (ModelError, OSError) as error:
        sys.exit(" ".join(str(error).split()))


if __name__ == "__main__":
    main()
