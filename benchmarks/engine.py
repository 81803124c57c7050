"""How many images per second does each engine process, and does the stream choose the fastest one?

Engines are compared on one thread, as in the stream's workers, and the chosen one with `keras.Model.predict` on all
cores. The choice is that of `models.engine_choice`, which times each engine for a second.
"""

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from benchmarks.pairs import Pair, pair
from benchmarks.service import photographs
from models.backbone import DEFAULT_BACKBONE, build, export_backbone
from models.bundle import BackboneEntry, EngineName
from models.engine_choice import compare_engines, engines_for, fastest
from models.scorer import load_engine

IMAGES, QUICK_IMAGES = 32, 8
MODELS = {DEFAULT_BACKBONE: "imagenet", "mobilenet_v2": "random", "inception_v3": "random"}
NAMES: dict[EngineName, str] = {"litert": "LiteRT", "onnx": "ONNX Runtime", "keras": "Keras"}


def questions(count: int = IMAGES) -> Iterator[Pair]:
    """Compare the chosen engine with every other one and with Keras, for each model."""
    threads = os.cpu_count() or 1
    with TemporaryDirectory() as scratch:
        for name, weights in MODELS.items():
            exported = export_backbone(name, weights, Path(scratch))
            entry, content = BackboneEntry.of(exported), exported.flatbuffer.read_bytes()
            chosen = fastest(compare_engines(entry, content, photographs(4)))
            images = np.random.default_rng(0).integers(0, 256, (count, *entry.input_size, 3), np.uint8)
            on_one = {one: partial(load_engine(entry, content, 1, one), images) for one in engines_for(entry)}
            for other in set(on_one) - {chosen}:
                yield _with_verdict(
                    pair("", "images/s", 1.0, count, on_one[chosen], on_one[other]), name, chosen, other
                )
            on_all = partial(load_engine(entry, content, threads, chosen), images)
            predict = partial(build(name, weights).predict, images, batch_size=count, verbose=0)
            question = f"{name}, {NAMES[chosen]} (chosen) against keras predict, all cores"
            yield pair(question, "images/s", 5.0, count, on_all, predict)


def quick_questions() -> Iterator[Pair]:
    """As `questions`, on fewer images."""
    yield from questions(QUICK_IMAGES)


def _with_verdict(found: Pair, model: str, chosen: EngineName, other: EngineName) -> Pair:
    """The pair, with a question that states whether the chosen engine was faster."""
    verdict = "chosen, the fastest" if found.ratio >= 1 else "chosen, not the fastest in this run"
    question = f"{model}, {NAMES[chosen]} ({verdict}) against {NAMES[other]}, one thread"
    return Pair(question, found.unit, found.aim, found.ours, found.peer)
