"""How much does int8 quantisation speed up one core, and how much accuracy does it cost?"""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from sklearn.linear_model import LogisticRegression

from benchmarks.pairs import Pair, pair
from models.backbone import DEFAULT_BACKBONE, export_backbone
from models.engine import LiteRTEngine
from models.scorer import decode_all
from streaming.images.dataset import digit_images

DIGITS, HELD_OUT, CALIBRATION, IMAGES = 1_000, 200, 100, 32
AIM = 1.1


def questions() -> Iterator[Pair]:
    with TemporaryDirectory() as scratch:
        plain = LiteRTEngine(export_backbone(DEFAULT_BACKBONE, "imagenet", Path(scratch)).flatbuffer)
        _, labels, encoded = zip(*digit_images(DIGITS), strict=True)
        images = decode_all(encoded, plain.input_size).images
        exported = export_backbone(DEFAULT_BACKBONE, "imagenet", Path(scratch), int8_calibration=images[:CALIBRATION])
        integers = LiteRTEngine(exported.flatbuffer)
        few = images[:IMAGES]
        question = f"{DEFAULT_BACKBONE} in 8-bit integers on one core, against float32"
        yield pair(question, "images/s", AIM, IMAGES, lambda: integers(few), lambda: plain(few))
        ours, peer = (100 * _accuracy(engine(images), np.array(labels)) for engine in (integers, plain))
        question = f"… its accuracy on {HELD_OUT} held-out digits, against float32"
        yield Pair(question, "%", 0.99, [ours], [peer])


def _accuracy(features: np.ndarray, labels: np.ndarray) -> float:
    scaled = (features - features[:-HELD_OUT].mean(axis=0)) / (features[:-HELD_OUT].std(axis=0) + 1e-6)
    fitted = LogisticRegression(max_iter=500).fit(scaled[:-HELD_OUT], labels[:-HELD_OUT])
    return float(fitted.score(scaled[-HELD_OUT:], labels[-HELD_OUT:]))
