"""8-bit backbones on real digits: a quarter of the size, nearly the same features, and the cost in accuracy."""

from pathlib import Path

import numpy as np
import pytest

from models.backbone import MIN_INT8_COSINE, ExportedBackbone, check_agreement, export_backbone
from models.bundle import BackboneEntry
from models.engine import LiteRTEngine
from models.errors import ModelError
from models.quantization import accuracy_cost, mean_cosine
from models.scorer import Head, decode_all
from tests.streaming.small_models import Digits, fit_head, some_digits

SIDE = 64  # a twelfth of the pixels of the default size
CALIBRATION = 40  # images


@pytest.fixture(scope="module")
def exact(exports: Path, exports_here: None) -> ExportedBackbone:
    return export_backbone("efficientnet_lite0", "imagenet", exports, input_size=(SIDE, SIDE))


@pytest.fixture(scope="module")
def digits(exact: ExportedBackbone) -> Digits:
    return some_digits(exact, 150)


@pytest.fixture(scope="module")
def head(digits: Digits) -> Head:
    return fit_head(digits.features, digits.labels, k=20)


@pytest.fixture(scope="module")
def pixels(digits: Digits) -> np.ndarray:
    return decode_all(digits.images, (SIDE, SIDE)).images


def quantise(pixels: np.ndarray, exports: Path) -> ExportedBackbone:
    """Export the backbone, calibrated on the first digits."""
    images = pixels[:CALIBRATION]
    return export_backbone("efficientnet_lite0", "imagenet", exports, input_size=(SIDE, SIDE), int8_calibration=images)


@pytest.fixture(scope="module")
def quantised(exports: Path, pixels: np.ndarray) -> ExportedBackbone:
    return quantise(pixels, exports)


@pytest.fixture(scope="module")
def quantised_features(quantised: ExportedBackbone, pixels: np.ndarray) -> np.ndarray:
    return LiteRTEngine(quantised.flatbuffer)(pixels)


def test_int8_export_is_small_and_recorded_as_int8(exact: ExportedBackbone, quantised: ExportedBackbone) -> None:
    assert quantised.flatbuffer.stat().st_size < exact.flatbuffer.stat().st_size / 3
    assert (exact.precision, quantised.precision) == ("float32", "int8")
    assert quantised.sha256 != exact.sha256
    entry = BackboneEntry.of(quantised)
    assert (entry.precision, entry.cosine, entry.parity) == ("int8", quantised.cosine, quantised.parity)
    with pytest.raises(ModelError, match="the engine keras computes in float32; int8 requires the engine litert"):
        BackboneEntry.of(quantised, engine="keras")
    assert not list(quantised.flatbuffer.parent.glob("*.npy"))  # no calibration images stay in the cache


def test_int8_features_are_close_to_float_features(
    quantised: ExportedBackbone, quantised_features: np.ndarray, digits: Digits
) -> None:
    assert quantised_features.dtype == np.float32
    assert 0.95 < quantised.cosine < 1
    others = slice(CALIBRATION, None)  # images on which it was not calibrated
    assert mean_cosine(digits.features[others], quantised_features[others]) > 0.95


def test_int8_features_do_not_depend_on_the_batch(
    quantised: ExportedBackbone, quantised_features: np.ndarray, pixels: np.ndarray
) -> None:
    engine = LiteRTEngine(quantised.flatbuffer.read_bytes(), threads=2)
    order = [9, 2, 70, 2]
    np.testing.assert_array_equal(engine(pixels[order]), quantised_features[order])


def test_accuracy_cost_of_int8_is_measured(head: Head, digits: Digits, quantised_features: np.ndarray) -> None:
    assert accuracy_cost(head, digits.features, digits.features, digits.labels) == 0
    assert accuracy_cost(head, digits.features, quantised_features, digits.labels) <= 0.05
    noise = np.random.default_rng(0).permuted(digits.features, axis=0)
    assert accuracy_cost(head, digits.features, noise, digits.labels) > 0.5
    with pytest.raises(ModelError, match="got 150, 3 and 150"):
        accuracy_cost(head, digits.features, quantised_features[:3], digits.labels)


def test_export_is_cached_by_its_calibration_images(
    quantised: ExportedBackbone, exact: ExportedBackbone, exports: Path, pixels: np.ndarray
) -> None:
    before = quantised.flatbuffer.stat().st_mtime_ns
    assert quantise(pixels, exports) == quantised
    assert quantised.flatbuffer.stat().st_mtime_ns == before
    assert quantised.flatbuffer.parent != exact.flatbuffer.parent


@pytest.mark.parametrize(
    "images",
    [np.zeros((0, 224, 224, 3), np.uint8), np.zeros((4, 96, 96, 3), np.uint8), np.zeros((4, 224, 224, 3), np.float32)],
    ids=["no images", "wrong size", "floats"],
)
def test_invalid_calibration_images_are_rejected(images: np.ndarray, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"at least one image, uint8 of shape \(N, 224, 224, 3\), got"):
        export_backbone("efficientnet_lite0", "imagenet", tmp_path, int8_calibration=images)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"precision": "int8", "cosine": MIN_INT8_COSINE - 0.01}, "calibrate on more images"),
        ({"precision": "int8", "cosine": float("nan")}, "calibrate on more images"),
        ({"precision": "float32", "parity": 2e-3, "largest": 5.0}, "the limit is 1e-03"),
        ({"precision": "float32", "parity": 2e-2, "largest": 1000.0}, "the limit is 1e-02"),
        ({"precision": "float32", "parity": float("nan"), "largest": 5.0}, "disagree on the features"),
    ],
)
def test_export_too_far_from_keras_is_rejected(record: dict[str, object], reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        check_agreement("vgg16", record)
    check_agreement("vgg16", {"precision": "float32", "parity": 5e-3, "largest": 1000.0})


def test_mean_cosine_is_averaged_over_rows() -> None:
    exact = np.array([[1, 0], [0, 2], [3, 4], [0, 0]], np.float32)
    other = np.array([[2, 0], [1, 0], [4, 3], [1, 1]], np.float32)
    assert mean_cosine(exact, other) == pytest.approx((1 + 0 + 24 / 25 + 0) / 4)
    assert mean_cosine(exact[2:], exact[2:]) == pytest.approx(1)  # two zero vectors count as equal
