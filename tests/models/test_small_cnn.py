from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from models import small_cnn
from models.backbone import build, export_backbone
from models.engine import KerasEngine
from models.errors import ModelError
from models.small_cnn import Conv, Dense, Flatten, SmallCnn


def test_gray_network_has_the_declared_layers() -> None:
    body = small_cnn.build(small_cnn.GRAY, (128, 128))
    shapes = [tuple(weight.shape) for weight in body.weights]
    # 128 → 126 → 63 → 59 → 29, and 29 · 29 · 16 = 13,456.
    assert shapes == [(3, 3, 1, 8), (8,), (5, 5, 8, 16), (16,), (13_456, 32), (32,), (32, 16), (16,)]


def test_gray_conversion_matches_pillow() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (1, 14, 15, 3), np.uint8)
    expected = np.asarray(Image.fromarray(pixels[0]).convert("L"), np.float64)
    identity = SmallCnn("identity", gray=True, layers=(Conv(1, 1), Flatten(), Dense(14 * 15)), min_side=14)
    body = small_cnn.build(identity, (14, 15))
    body.set_weights([np.ones((1, 1, 1, 1)), np.zeros(1), np.eye(14 * 15), np.zeros(14 * 15)])
    gray = np.asarray(body(pixels.astype(np.float32)))
    assert np.abs(gray.reshape(14, 15) - expected).max() <= 0.5 + 1e-3  # Pillow rounds


def test_gray_network_ignores_colour() -> None:
    pixels = np.zeros((2, 32, 32, 3), np.uint8)
    pixels[0, :, :, 0], pixels[1, :, :, 1] = 117, 60  # red and green of luma 35
    gray, color = (
        KerasEngine(build(name, "random", input_size=(32, 32)))(pixels) for name in ("cnn_gray", "cnn_color")
    )
    assert np.abs(gray[0] - gray[1]).max() < 0.02 * np.abs(gray).max()
    assert np.abs(color[0] - color[1]).max() > 0.2 * np.abs(color).max()


@pytest.mark.parametrize("name", ["cnn_gray", "cnn_color"])
def test_imagenet_weights_error_names_the_alternatives(name: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=rf"{name} has no ImageNet weights: train it .*train-cnn.* or `random`"):
        export_backbone(name, "imagenet", tmp_path)


def test_pixels_backbone_rejects_weights(tmp_path: Path) -> None:
    (tmp_path / "mine.weights.h5").write_bytes(b"")
    with pytest.raises(ModelError, match="pixels has no weights to load: omit the option; got '.*mine"):
        export_backbone("pixels", str(tmp_path / "mine.weights.h5"), tmp_path)


def test_pixels_are_scaled_and_flattened_row_by_row() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 3), np.uint8)
    features = KerasEngine(build("pixels", input_size=(4, 5)))(pixels)
    np.testing.assert_allclose(features, pixels.reshape(3, -1) / 255, rtol=1e-6)
