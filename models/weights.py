"""The weights of a backbone: random, or from a local file. Only numbers are taken from a file, never code."""

import warnings
import zipfile
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from models.errors import ModelError

if TYPE_CHECKING:
    import keras

RANDOM_SEED = 0
_SUFFIXES = (".h5", ".hdf5", ".keras", ".npz")


def local_file(weights: str) -> Path:
    """The file that `weights` names; raises ModelError if there is none, or none of a kind that can be read."""
    file = Path(weights)
    if not file.is_file():
        raise ModelError(f"weights must be imagenet, random or a file, and there is no file {weights!r}")
    if file.suffix not in _SUFFIXES:
        raise ModelError(f"a weights file ends in one of {', '.join(_SUFFIXES)}, got {file.name!r}")
    return file.resolve()


def randomise(body: "keras.Model", seed: int = RANDOM_SEED) -> None:
    """He-normal kernels from a seed; biases are 0, normalisations the identity. Keras' global seed is left alone."""
    generator = np.random.default_rng(seed)
    for weight in body.weights:
        if len(weight.shape) > 1:
            inputs = prod(weight.shape[:2]) if "depthwise" in weight.path else prod(weight.shape[:-1])
            weight.assign(generator.normal(0.0, (2.0 / inputs) ** 0.5, weight.shape))


def load(body: "keras.Model", file: Path, name: str) -> None:
    """Load `file` into `body`, the network of backbone `name`; raises ModelError unless it sets every single weight.

    An `.npz` holds the arrays in Keras' order, as `numpy.savez(file, *body.get_weights())` writes them.
    """
    # Keras only warns of layers that it finds nothing for; whatever it leaves alone stays NaN and is found out.
    body.set_weights([np.full(weight.shape, np.nan, np.float32) for weight in body.weights])
    try:
        if file.suffix == ".npz":
            _load_npz(body, file)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                body.load_weights(file)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"the weights in {file} do not fit {name} without its top: {reason}") from error
    unset = [weight.path for weight in body.weights if not np.isfinite(weight).all()]
    if unset:
        raise ModelError(
            f"the weights in {file} do not fit {name} without its top: "
            f"{len(unset)} of {len(body.weights)} are missing or not finite, {unset[0]} among them"
        )


def _load_npz(body: "keras.Model", file: Path) -> None:
    if not zipfile.is_zipfile(file):  # numpy would take another kind of file for a single array, or for a pickle
        raise ModelError("not an npz")
    with np.load(file, allow_pickle=False) as arrays:
        body.set_weights([arrays[f"arr_{i}"] for i in range(len(arrays.files))])
