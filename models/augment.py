"""Augmentation of training images: mild random flips, rotations, crops and changes of brightness.

These are the common ones (Shorten and Khoshgoftaar 2019, "A survey on image data augmentation for deep learning").
Whether images may be mirrored depends on the subject: digits may not.
"""

from dataclasses import dataclass
from math import cos, radians, sin

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]
WHITE = 255


@dataclass(frozen=True, slots=True)
class Augmentation:
    """The ranges from which augmentations are drawn uniformly.

    Attributes:
        mirror: flip horizontally with probability 1/2.
        max_degrees: the largest rotation in either direction.
        min_crop: the smallest side of the crop, as a share of the image's.
        max_brightness: the largest relative change of brightness.
    """

    mirror: bool = True
    max_degrees: float = 10.0
    min_crop: float = 0.85
    max_brightness: float = 0.2


DEFAULT_AUGMENTATION = Augmentation()


def augment(image: Pixels, image_id: str, copy: int, how: Augmentation = DEFAULT_AUGMENTATION) -> Pixels:
    """Return an augmented copy of an image, (H, W, 3) uint8, deterministically; pixels beyond the edge repeat the edge.

    Args:
        image: (H, W, 3) uint8.
        image_id: with `copy`, the seed.
        copy: the number of the copy.
    """
    generator = np.random.default_rng([copy, *image_id.encode()])
    mirrored = how.mirror and generator.random() < 0.5  # noqa: PLR2004
    angle = radians(generator.uniform(-how.max_degrees, how.max_degrees))
    side = generator.uniform(how.min_crop, 1.0)
    shift = generator.uniform(-0.5, 0.5, 2) * (1.0 - side)  # keeps the unrotated window inside the image
    light = 1.0 + generator.uniform(-how.max_brightness, how.max_brightness)
    height, width, _ = image.shape
    margin = max(height, width) // 2  # the farthest that a rotated window reaches beyond the edge
    padded = np.pad(image, ((margin, margin), (margin, margin), (0, 0)), mode="edge")
    across, down = side * cos(angle), side * sin(angle)
    left = margin + width * (0.5 + shift[0]) - across * width / 2 + down * height / 2
    top = margin + height * (0.5 + shift[1]) - down * width / 2 - across * height / 2
    # (x, y) of the copy shows (across x - down y + left, down x + across y + top) of the padded image.
    window = (across, -down, left, down, across, top)
    turned = Image.fromarray(padded).transform(
        (width, height), Image.Transform.AFFINE, window, Image.Resampling.BILINEAR
    )
    pixels = np.asarray(turned, np.float32) * light
    altered: Pixels = np.clip(np.rint(pixels), 0, WHITE).astype(np.uint8)
    return np.ascontiguousarray(altered[:, ::-1]) if mirrored else altered
