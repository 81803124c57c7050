"""How many images a second does each engine featurize on all cores: LiteRT, ONNX Runtime, and `keras.Model.predict`?"""

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np

from benchmarks.pairs import Pair, pair
from models.backbone import DEFAULT_BACKBONE, build, export_backbone
from models.bundle import BackboneEntry
from models.scorer import load_engine

IMAGES = 32
MODELS = {DEFAULT_BACKBONE: "imagenet", "mobilenet_v2": "random", "inception_v3": "random"}


def questions() -> Iterator[Pair]:
    """For each model, the faster engine against the other one, then against Keras."""
    threads = os.cpu_count() or 1
    with TemporaryDirectory() as scratch:
        for name, weights in MODELS.items():
            exported = export_backbone(name, weights, Path(scratch))
            entry, content = BackboneEntry.of(exported), exported.flatbuffer.read_bytes()
            images = np.random.default_rng(0).integers(0, 256, (IMAGES, *entry.input_size, 3), np.uint8)
            litert, onnx = (partial(load_engine(entry, content, threads, one), images) for one in ("litert", "onnx"))
            found = pair(f"{name}, LiteRT against ONNX Runtime", "images/s", 1.0, IMAGES, litert, onnx)
            fastest, call = "LiteRT", litert
            if median(found.ours) < median(found.peer):
                fastest, call = "ONNX Runtime", onnx
                found = Pair(f"{name}, ONNX Runtime against LiteRT", "images/s", 1.0, found.peer, found.ours)
            yield found
            predict = partial(build(name, weights).predict, images, batch_size=IMAGES, verbose=0)
            yield pair(f"{name}, {fastest} against keras predict", "images/s", 5.0, IMAGES, call, predict)
