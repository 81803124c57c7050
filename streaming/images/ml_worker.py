"""The part of `streaming.ml` that runs in Python workers: columns of images or features to columns of results.

A row that cannot be read results in null and, for images, a reason. The model is broadcast and loaded once per worker
process. This module is not in `streaming.ml` because importing that package takes a worker most of a second.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from models.arrays import Features
from models.decode import DEFAULT_LIMITS, BadImage, Reason, Resize, Stage
from models.errors import ModelError
from models.pixels import shape_pixels
from models.recipe import Pixels, Recipe, decode_fitted, empty_pixels
from models.scorer import Engine
from streaming.storage.files import as_matrix, list_array

IMAGES_AT_ONCE = 64
RESULT_DDL = "values array<float>, reason string"
# OpenCV types of Spark's image source → Pillow mode, raw mode and number of channels.
LAYOUTS = {0: ("L", "L", 1), 16: ("RGB", "BGR", 3), 24: ("RGBA", "BGRA", 4)}

Values = NDArray[np.float32]


def from_images(
    columns: Iterator[Any], engine: Engine, fitting: Resize | Recipe, finish: Callable[[Features], Values]
) -> Iterator[Any]:
    """Yield a struct of `RESULT_DDL` per image.

    Args:
        columns: Arrow arrays of images (bytes, or Spark's image struct).
        engine: pixels → features (N, D).
        fitting: how the images are resized to the model's input.
        finish: features (N, D) → values (N, K) float32.
    """
    for column in columns:
        for start in range(0, len(column), IMAGES_AT_ONCE):
            yield _image_results(column.slice(start, IMAGES_AT_ONCE), engine, fitting, finish)


def from_features(columns: Iterator[Any], n_in: int, finish: Callable[[Features], Values]) -> Iterator[Any]:
    """Yield an array<float> per row of features; null stays null.

    Args:
        columns: Arrow arrays of lists of length `n_in`.
        finish: features (N, n_in) → values (N, K) float32.

    Raises:
        ModelError: an array has another length.
    """
    for column in columns:
        given = column.drop_null()
        if not len(given):
            yield pa.nulls(len(column), pa.list_(pa.float32()))
            continue
        matrix = as_matrix(given)
        if matrix.shape[1] != n_in:
            raise ModelError(f"expected {n_in} features per row, got {matrix.shape[1]}")
        rows = np.flatnonzero(column.is_valid().to_numpy(zero_copy_only=False))
        yield _placed(finish(matrix), rows, len(column))


def _image_results(column: Any, engine: Engine, fitting: Resize | Recipe, finish: Callable[[Features], Values]) -> Any:
    rows: list[int] = []
    images = empty_pixels(len(column), engine.input_size, fitting)
    reasons: list[str | None] = [None] * len(column)
    for row, value in enumerate(column.to_pylist()):
        image = _decode(value, engine.input_size, fitting)
        if isinstance(image, BadImage):
            reasons[row] = f"{image.reason}: {image.detail}"
        else:
            images[len(rows)] = image
            rows.append(row)
    features = engine(images[: len(rows)])
    finite = np.isfinite(features).all(axis=1)
    for place in np.flatnonzero(~finite):
        reasons[rows[place]] = f"{Reason.NON_FINITE_FEATURES}: the backbone's features of this image are not finite"
    values = _placed(finish(features[finite]), np.array(rows, np.int64)[finite], len(column))
    return pa.StructArray.from_arrays([values, pa.array(reasons, pa.string())], ["values", "reason"])


def _placed(values: Values, rows: NDArray[np.int64], n: int) -> Any:
    """Return a list column of `n` rows with `values` (N, K) at the indices `rows` and null elsewhere."""
    where = np.full(n, -1, np.int64)
    where[rows] = np.arange(len(rows))
    return list_array(values).take(pa.array(where, mask=where < 0))


def _decode(value: Any, size: tuple[int, int], fitting: Resize | Recipe) -> Pixels | BadImage:
    if isinstance(value, dict):
        image = _image(value)
        if isinstance(image, BadImage):
            return image
        if isinstance(fitting, Recipe):
            return fitting.fitted(shape_pixels(image, size, "whole"))
        return shape_pixels(image, size, fitting)
    found = decode_fitted(value, size, fitting)
    return found if isinstance(found, BadImage) else found.pixels


def _image(image: dict[str, Any]) -> Image.Image | BadImage:
    """Convert Spark's image struct, which contains decoded pixels, to an image."""
    height, width, channels, mode, data = (image[name] for name in ("height", "width", "nChannels", "mode", "data"))
    if data is None or not all(isinstance(number, int) for number in (height, width, channels, mode)):
        return BadImage(Stage.READ, Reason.MISSING, "the image struct has no pixels")
    if height < 1 or width < 1:  # from Spark's image source for a file that it cannot read
        return BadImage(Stage.DECODE, Reason.NOT_AN_IMAGE, f"the image struct has {width}x{height} pixels")
    layout = LAYOUTS.get(mode)
    if layout is None or layout[2] != channels:
        detail = f"OpenCV mode {mode} with {channels} channels: expected 0, 16 or 24 with 1, 3 or 4"
        return BadImage(Stage.DECODE, Reason.UNSUPPORTED_MODE, detail)
    if height * width > DEFAULT_LIMITS.max_pixels:
        detail = f"{width}x{height} pixels, the limit is {DEFAULT_LIMITS.max_pixels}"
        return BadImage(Stage.DECODE, Reason.DECOMPRESSION_BOMB, detail)
    if len(data) != height * width * channels:
        expected = f"expected {height * width * channels} for {width}x{height} with {channels} channels"
        detail = f"{len(data)} bytes of pixels: {expected}"
        return BadImage(Stage.DECODE, Reason.CORRUPT, detail)
    return Image.frombytes(layout[0], (width, height), bytes(data), "raw", layout[1])
