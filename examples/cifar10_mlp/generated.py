"""Generated images in both versions of CIFAR-10's layout: ten coloured shapes on a coloured ground, with noise.

Only the class names are those of CIFAR-10. The python version is written as by Python 2.
"""

import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from examples.cifar10_mlp.batches import CLASSES, SIDE, WIDTH

NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
TRAINING_BATCHES = 5
SEED = 614
NOISE = 12.0  # standard deviation of pixel values
DARK_SHAPES = 0.4  # share of images whose shape is darker than the ground, which are hard for a model on pixels
SHORT = 256  # length limit of the opcode for short strings
# What Python 2's pickles hold of a NumPy array in front of its shape, and as its dtype.
ARRAY = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
UINT8 = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"

Version = Literal["python", "binary"]


def write_cifar10(folder: Path, per_batch: int, version: Version = "python") -> Path:
    """Write five training batches and a test batch of `per_batch` images each, deterministically."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [*(f"data_batch_{number}" for number in range(1, TRAINING_BATCHES + 1)), "test_batch"]
    for number, name in enumerate(names):
        data, labels = draw_batch(per_batch, np.random.default_rng((SEED, number)))
        if version == "binary":
            rows = np.concatenate([labels[:, None].astype(np.uint8), data], axis=1)
            (folder / f"{name}.bin").write_bytes(rows.tobytes())
        else:
            files = [f"{NAMES[label]}_{place:06d}.png" for place, label in enumerate(labels)]
            batch = {"batch_label": name, "labels": labels.tolist(), "data": data, "filenames": files}
            (folder / name).write_bytes(python2_pickle(batch))
    if version == "binary":
        (folder / "batches.meta.txt").write_text("\n".join(NAMES) + "\n", encoding="utf-8")
    else:
        about = {"num_cases_per_batch": per_batch, "label_names": list(NAMES), "num_vis": WIDTH}
        (folder / "batches.meta").write_bytes(python2_pickle(about))
    return folder


def draw_batch(count: int, generator: np.random.Generator) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Draw (data (count, 3072), labels (count,)) with balanced classes in random order."""
    labels = generator.permutation(np.arange(count) % CLASSES)
    data = np.empty((count, WIDTH), np.uint8)
    for row, label in enumerate(labels):
        pixels = np.asarray(draw_image(int(label), generator), np.float32)
        noisy = pixels + generator.normal(0, NOISE, pixels.shape)
        data[row] = np.clip(noisy, 0, 255).astype(np.uint8).transpose(2, 0, 1).ravel()
    return data, labels


def draw_image(label: int, generator: np.random.Generator) -> Image.Image:
    """Draw the shape of the class near the centre, usually lighter than the ground."""
    ground = generator.integers(0, 130, 3)
    shape = ground + generator.integers(40, 125, 3)
    if generator.uniform() < DARK_SHAPES:
        ground, shape = shape, ground
    image = Image.new("RGB", (SIDE, SIDE), tuple(map(int, ground)))
    draw = ImageDraw.Draw(image)
    across, down = generator.integers(13, 19, 2)
    half = int(generator.integers(8, 12))
    box = (int(across) - half, int(down) - half, int(across) + half, int(down) + half)
    _draw_shape(draw, label, box, tuple(map(int, shape)))
    return image


def _draw_shape(draw: ImageDraw.ImageDraw, label: int, box: tuple[int, int, int, int], colour: tuple[int, ...]) -> None:
    left, top, right, bottom = box
    middle, centre, third = (left + right) // 2, (top + bottom) // 2, (right - left) // 3
    lower, further = range(top, top + 3 * third, third), range(left, left + 3 * third, third)
    upright, level = (middle - 2, top, middle + 2, bottom), (left, centre - 2, right, centre + 2)
    fill, outline, line = {"fill": colour}, {"outline": colour, "width": 3}, {"fill": colour, "width": 4}
    shapes: list[tuple[Callable[..., None], Sequence[Any], dict[str, Any]]] = [
        (draw.ellipse, [box], fill),
        (draw.ellipse, [box], outline),
        (draw.rectangle, [box], fill),
        (draw.rectangle, [box], outline),
        (draw.polygon, [[(middle, top), (right, bottom), (left, bottom)]], fill),
        (draw.polygon, [[(left, top), (right, top), (middle, bottom)]], fill),
        (draw.rectangle, [upright, level], fill),
        (draw.line, [box, (left, bottom, right, top)], line),
        (draw.rectangle, [(left, start, right, start + third // 2) for start in lower], fill),
        (draw.rectangle, [(start, top, start + third // 2, bottom) for start in further], fill),
    ]
    method, places, style = shapes[label]
    for place in places:
        method(place, **style)


def python2_pickle(value: Any) -> bytes:
    """Pickle dictionaries, lists, strings, integers and a uint8 array (N, M) with the opcodes of Python 2."""
    return b"\x80\x02" + _opcodes(value) + b"."


def _opcodes(value: Any) -> bytes:
    match value:
        case dict():
            return b"}(" + b"".join(_opcodes(part) for item in value.items() for part in item) + b"u"
        case list():
            return b"](" + b"".join(map(_opcodes, value)) + b"e"
        case int():
            return b"J" + struct.pack("<i", value)
        case str() | bytes():
            data = value.encode("latin-1") if isinstance(value, str) else value
            head = b"U" + bytes([len(data)]) if len(data) < SHORT else b"T" + struct.pack("<i", len(data))
            return head + data
        case np.ndarray():
            shape = b"".join(map(_opcodes, value.shape)) + b"\x86"
            return ARRAY + b"(K\x01" + shape + UINT8 + b"\x89" + _opcodes(value.tobytes()) + b"tb"
    raise TypeError(f"a batch cannot contain a {type(value).__name__}")
