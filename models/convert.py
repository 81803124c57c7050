"""Convert a backbone to LiteRT in a process of its own: `python -m models.convert NAME WEIGHTS FOLDER`.

Writes the flatbuffer, the Keras weights and a record (hashes, parity) into the folder. The last line on standard error
says why it failed, if it did.
"""

import json
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from models.backbone import FLATBUFFER_FILE, RECORD_FILE, WEIGHTS_FILE, build, build_body, file_sha256, find_backbone
from models.engine import KerasEngine, LiteRTEngine
from models.errors import ModelError

if TYPE_CHECKING:
    import keras


def convert(name: str, weights: str, folder: Path) -> None:
    """Export backbone `name` with `weights` into the empty `folder`."""
    spec = find_backbone(name)
    build_body(spec, weights).save_weights(folder / WEIGHTS_FILE)
    # Built again from the very file that was written: the flatbuffer and the Keras weights cannot drift apart.
    model = build(name, str(folder / WEIGHTS_FILE))
    flatbuffer = to_flatbuffer(model)
    (folder / FLATBUFFER_FILE).write_bytes(flatbuffer)
    images = comparison_images(spec.input_size)
    parity = float(np.abs(KerasEngine(model)(images) - LiteRTEngine(flatbuffer)(images)).max())
    hashes = {file: file_sha256(folder / file) for file in (FLATBUFFER_FILE, WEIGHTS_FILE)}
    (folder / RECORD_FILE).write_text(json.dumps({"parity": parity, "sha256": hashes}), encoding="utf-8")


def to_flatbuffer(model: "keras.Model") -> bytes:
    """Convert a Keras model by way of a SavedModel, the only way that works with Keras 3.15."""
    import tensorflow as tf

    with TemporaryDirectory() as saved:
        model.export(saved, format="tf_saved_model", verbose=False)
        flatbuffer: bytes = tf.lite.TFLiteConverter.from_saved_model(saved).convert()
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
    """The process' entry: convert what the command line names."""
    name, weights, folder = sys.argv[1:]
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # this process' own environment, before TensorFlow is imported
    try:
        import tensorflow as tf

        tf.config.set_visible_devices([], "GPU")  # a GPU's reduced precision would blur the comparison
        convert(name, weights, Path(folder))
    except (ModelError, OSError) as error:
        sys.exit(" ".join(str(error).split()))


if __name__ == "__main__":
    main()
