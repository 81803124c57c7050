"""Augmented copies: deterministic, distinct, and within the configured limits."""

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from models.augment import Augmentation, Pixels, augment

DISABLED = Augmentation(mirror=False, max_degrees=0.0, min_crop=1.0, max_brightness=0.0)


@pytest.fixture(scope="module")
def flower() -> Pixels:
    """(48, 64, 3): wider than high, so that swapped axes are detected."""
    return np.asarray(Image.fromarray(load_sample_images().images[1]).resize((64, 48)))


def test_copies_are_deterministic_and_distinct(flower: Pixels) -> None:
    copies = [augment(flower, image_id, copy) for image_id in ("a", "b") for copy in (1, 2, 3)]
    again = [augment(flower, image_id, copy) for image_id in ("a", "b") for copy in (1, 2, 3)]
    for one, other in zip(copies, again, strict=True):
        np.testing.assert_array_equal(one, other)
        assert (one.shape, one.dtype) == (flower.shape, np.uint8)
    assert len({copy.tobytes() for copy in [flower, *copies]}) == 7


def test_disabled_augmentation_is_the_identity(flower: Pixels) -> None:
    before = flower.copy()
    np.testing.assert_array_equal(augment(flower, "a", 1, DISABLED), flower)
    np.testing.assert_array_equal(flower, before)


def test_half_of_the_copies_are_mirrored(flower: Pixels) -> None:
    options = Augmentation(mirror=True, max_degrees=0.0, min_crop=1.0, max_brightness=0.0)
    copies = [augment(flower, "a", copy, options) for copy in range(40)]
    mirrored = [np.array_equal(copy, flower[:, ::-1]) for copy in copies]
    assert all(np.array_equal(copy, flower) for copy, one in zip(copies, mirrored, strict=True) if not one)
    assert 10 <= sum(mirrored) <= 30


def test_brightness_stays_within_its_bounds() -> None:
    grey = np.full((16, 16, 3), 100, np.uint8)
    options = Augmentation(mirror=False, max_degrees=10.0, min_crop=0.8, max_brightness=0.2)
    # `item` fails for more than one level: there are no black corners.
    levels = {int(np.unique(augment(grey, "a", copy, options)).item()) for copy in range(50)}
    assert min(levels) >= 80
    assert max(levels) <= 120
    assert len(levels) > 10


def test_rotation_and_crop_stay_within_their_limits() -> None:
    """An off-centre dot moves on a circle when rotated, and outward when cropped."""
    image = np.zeros((101, 101, 3), np.uint8)
    image[48:53, 78:83] = 255
    rotated = Augmentation(mirror=False, max_degrees=30.0, min_crop=1.0, max_brightness=0.0)
    cropped = Augmentation(mirror=False, max_degrees=0.0, min_crop=0.7, max_brightness=0.0)

    def dot(pixels: Pixels) -> tuple[float, float]:
        rows, columns = np.nonzero(pixels[..., 0] > 127)
        return float(columns.mean()) - 50, float(rows.mean()) - 50

    angles = []
    for copy in range(20):
        x, y = dot(augment(image, "a", copy, rotated))
        assert np.hypot(x, y) == pytest.approx(30, abs=1.0)
        angles.append(np.degrees(np.arctan2(y, x)))
    assert -31 < min(angles) < -10
    assert 10 < max(angles) < 31
    spread = [dot(augment(image, "a", copy, cropped))[0] for copy in range(20)]
    assert max(spread) > 36
    assert all(15 < x < 66 for x in spread)
