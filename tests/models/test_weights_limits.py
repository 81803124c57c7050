"""Weights files that declare more data than the network has are rejected by their metadata, before they are read."""

import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest

from models.errors import ModelError
from models.weights import _check_size

VALUES = 1_000_000


def hdf5(path: Path, values: int) -> Path:
    with h5py.File(path, "w") as file:
        file.create_group("layers").create_dataset("kernel", (values,), "f4", chunks=(65_536,), compression="gzip")
    return path


def zipped(path: Path, name: str, content: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return path


def test_weights_of_the_declared_size_with_optimizer_state_are_accepted(tmp_path: Path) -> None:
    _check_size(hdf5(tmp_path / "a.weights.h5", 3 * VALUES), VALUES)
    np.savez(tmp_path / "a.npz", np.zeros(VALUES, np.float32))
    _check_size(tmp_path / "a.npz", VALUES)
    content = hdf5(tmp_path / "b.h5", VALUES).read_bytes()
    _check_size(zipped(tmp_path / "b.keras", "model.weights.h5", content), VALUES)


def test_decompression_bomb_is_rejected(tmp_path: Path) -> None:
    huge = hdf5(tmp_path / "huge.h5", 300_000_000)
    assert huge.stat().st_size < 100_000
    bombs = [
        huge,
        zipped(tmp_path / "inner.keras", "model.weights.h5", huge.read_bytes()),
        zipped(tmp_path / "zip.npz", "arr_0.npy", bytes(100_000_000)),
    ]
    for bomb in bombs:
        with pytest.raises(ModelError, match=r"it unpacks to [\d,]+ bytes, the limit for this network is"):
            _check_size(bomb, VALUES)


def test_links_to_other_files_are_rejected(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "link.h5", "w") as file:
        file["kernel"] = h5py.ExternalLink("/etc/passwd", "x")
    with h5py.File(tmp_path / "soft.h5", "w") as file:
        file["kernel"] = h5py.SoftLink("/kernel")  # points to itself
    with h5py.File(tmp_path / "raw.h5", "w") as file:
        file.create_dataset("kernel", (10,), "f4", external=[("/etc/passwd", 0, 40)])
    for name in ("link", "soft", "raw"):
        with pytest.raises(ModelError, match="elsewhere|another file"):
            _check_size(tmp_path / f"{name}.h5", VALUES)
