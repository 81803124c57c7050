"""The weights of a backbone: random, or from a local file, of which only numbers are read, no code."""

import warnings
import zipfile
from io import BytesIO
from math import prod
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

from models.errors import ModelError

if TYPE_CHECKING:
    import keras

RANDOM_SEED = 0
MAX_EXCESS = 4  # times the size of the weights: optimizers store two more values for each
MAX_H5_OBJECTS = 10_000
_SUFFIXES = (".h5", ".hdf5", ".keras", ".npz")


def local_file(weights: str) -> Path:
    """The absolute path of a weights file; raises ModelError if it does not exist or has another suffix."""
    file = Path(weights)
    if not file.is_file():
        raise ModelError(f"weights must be imagenet, random or a file, and there is no file {weights!r}")
    if file.suffix not in _SUFFIXES:
        raise ModelError(f"a weights file ends in one of {', '.join(_SUFFIXES)}, got {file.name!r}")
    return file.resolve()


def randomise(body: "keras.Model", seed: int = RANDOM_SEED) -> None:
    """Set He-normal kernels from a seed, without changing Keras' global seed; other weights keep their values."""
    generator = np.random.default_rng(seed)
    for weight in body.weights:
        if len(weight.shape) > 1:
            inputs = prod(weight.shape[:2]) if "depthwise" in weight.path else prod(weight.shape[:-1])
            weight.assign(generator.normal(0.0, (2.0 / inputs) ** 0.5, weight.shape))


def load(body: "keras.Model", file: Path, name: str) -> None:
    """Load a weights file.

    Args:
        body: the network, see `models.backbone.build_body`.
        file: saved by Keras, or an `.npz` written by `numpy.savez(file, *body.get_weights())`.
        name: the backbone, for errors.

    Raises:
        ModelError: the file does not set every weight.
    """
    # Keras only warns about layers without weights in the file; theirs remain NaN, which is detected below.
    body.set_weights([np.full(weight.shape, np.nan, np.float32) for weight in body.weights])
    try:
        _check_size(file, sum(prod(weight.shape) for weight in body.weights))
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


def _check_size(file: Path, values: int) -> None:
    """Raise ModelError for a file that decompresses to far more than `values` float32 values."""
    most = MAX_EXCESS * 4 * values + 16 * 1024**2
    claimed = 0
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            claimed = sum(entry.file_size for entry in archive.infolist())
            inner = [entry for entry in archive.infolist() if entry.filename.endswith(".h5")]
            if claimed <= most:
                for entry in inner:
                    with archive.open(entry) as stream:
                        claimed += _claimed_by_h5(BytesIO(stream.read()))
    elif file.suffix != ".npz":
        with file.open("rb") as stream:
            claimed = _claimed_by_h5(stream)
    if claimed > most:
        raise ModelError(f"it unpacks to {claimed:,} bytes, the limit for this network is {most:,}")


def _claimed_by_h5(stream: IO[bytes]) -> int:
    """The bytes of all data sets of an HDF5 file by their shapes; raises ModelError for links to other files."""
    import h5py

    claimed = 0
    with h5py.File(stream, "r") as h5:
        pending = [h5]
        for _ in range(MAX_H5_OBJECTS):
            if not pending:
                return claimed
            group = pending.pop()
            for name in group:
                if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                    raise ModelError(f"{name!r} is a link to another file")
                one = group[name]
                if isinstance(one, h5py.Group):
                    pending.append(one)
                elif not isinstance(one, h5py.Dataset):
                    continue
                elif one.external or one.is_virtual:
                    raise ModelError(f"the data of {name!r} are in another file")
                else:
                    claimed += one.size * one.dtype.itemsize
    raise ModelError(f"it has more than {MAX_H5_OBJECTS:,} groups")


def _load_npz(body: "keras.Model", file: Path) -> None:
    if not zipfile.is_zipfile(file):  # NumPy would read any other file as a single array or a pickle
        raise ModelError("not an npz")
    with np.load(file, allow_pickle=False) as arrays:
        body.set_weights([arrays[f"arr_{i}"] for i in range(len(arrays.files))])
