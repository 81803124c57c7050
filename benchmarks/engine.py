"""How many images a second does one thread of the engine featurize, against `keras.Model.predict` on one core?"""

import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from benchmarks.pairs import Pair, pair
from models.backbone import DEFAULT_BACKBONE, build, export_backbone
from models.engine import LiteRTEngine

IMAGES = 32


def questions() -> Iterator[Pair]:
    with TemporaryDirectory() as scratch:
        exported = export_backbone(DEFAULT_BACKBONE, "imagenet", Path(scratch))
        engine = LiteRTEngine(exported.flatbuffer, threads=os.cpu_count() or 1)
        images = np.random.default_rng(0).integers(0, 256, (IMAGES, *engine.input_size, 3), np.uint8)
        model = build(DEFAULT_BACKBONE)
        yield pair(
            f"{DEFAULT_BACKBONE} on all cores, against keras predict",
            "images/s",
            5.0,
            IMAGES,
            lambda: engine(images),
            lambda: model.predict(images, batch_size=IMAGES, verbose=0),
        )
