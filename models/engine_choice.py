"""Choosing the fastest engine on this machine among those that agree on the golden images.

Every engine that can run the network computes the features of a bundle's golden images. One that differs from the
manifest's engine by more than rounding is excluded; the others are timed for a second each, alternately, so that other
load affects them equally. Keras is used only if the manifest says so, and then alone: it needs half a gigabyte and is
slower on every processor measured.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.backbone import MAX_PARITY_ERROR, MAX_RELATIVE_PARITY_ERROR
from models.bundle import BackboneEntry, EngineName
from models.errors import ModelError
from models.scorer import Engine, decode_all, load_engine

SECONDS = 1.0  # per engine


@dataclass(frozen=True)
class Timed:
    """The result of an engine: images per second and the largest difference of a feature, or why it was excluded."""

    images_per_s: float | None = None
    difference: float | None = None
    why: str | None = None


def engines_for(entry: BackboneEntry) -> tuple[EngineName, ...]:
    """The engines that can run a network, the manifest's first."""
    if entry.engine in {"keras", "onnx"} or entry.precision != "float32":
        return (entry.engine,)
    return ("litert", "onnx")


def compare_engines(
    entry: BackboneEntry,
    content: bytes,
    images: Sequence[bytes],
    providers: Sequence[str] = ("cpu",),
    seconds: float = SECONDS,
) -> dict[EngineName, Timed]:
    """Load, check and time every engine that can run a network, on one thread.

    Args:
        entry: the network in the manifest.
        content: the file that the manifest's engine runs.
        images: encoded images for the comparison.
        seconds: the time per engine.

    Raises:
        ModelError: the manifest's engine cannot run the network, or no image can be decoded.
    """
    decoded = decode_all(images, entry.input_size, entry.fitting)
    if not decoded.rows:
        raise ModelError("cannot compare engines: none of the images can be decoded")
    results: dict[EngineName, Timed] = {}
    engines: dict[EngineName, Engine] = {}
    expected: NDArray[np.float32] | None = None
    for name in engines_for(entry):
        try:
            engine = load_engine(entry, content, 1, name, providers)
            features = engine(decoded.images)
        except ModelError as error:
            if expected is None:
                raise
            results[name] = Timed(why=str(error))
            continue
        expected = features if expected is None else expected
        difference = float(np.abs(features - expected).max())
        allowed = max(MAX_PARITY_ERROR, MAX_RELATIVE_PARITY_ERROR * float(np.abs(expected).max()))
        if difference <= allowed:
            engines[name] = engine
            results[name] = Timed(difference=difference)
        else:
            results[name] = Timed(difference=difference, why=f"differs by {difference:.1e}, the limit is {allowed:.0e}")
    if len(engines) > 1:
        for name, speed in _speeds(engines, decoded.images, seconds).items():
            results[name] = Timed(speed, results[name].difference)
    return results


def fastest(results: dict[EngineName, Timed]) -> EngineName:
    """The engine to use: the fastest one, or the only one that agrees."""
    agreeing = [name for name, timed in results.items() if timed.why is None]
    return max(agreeing, key=lambda name: results[name].images_per_s or 0.0)


def _speeds(engines: dict[EngineName, Engine], images: NDArray[Any], seconds: float) -> dict[EngineName, float]:
    """Images per second of each engine in its fastest pass, which other load disturbs least."""
    best = dict.fromkeys(engines, float("inf"))
    end = perf_counter() + seconds * len(engines)
    while perf_counter() < end:
        for name, engine in engines.items():
            start = perf_counter()
            engine(images)
            best[name] = min(best[name], perf_counter() - start)
    return {name: len(images) / took for name, took in best.items()}
