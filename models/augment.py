"""Altered copies of training images: mirrored, a little turned, cropped and lit otherwise, the class unchanged.

The usual ones of image classification (Shorten and Khoshgoftaar 2019, "A survey on image data augmentation for deep
learning"), mild enough for any subject; whether left and right may be swapped depends on it (digits: no).
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
    """How far a copy may differ; each copy draws evenly within these bounds.

    Attributes:
        mirror: swap left and right in every other copy.
        max_degrees: turned by so much, either way.
        min_crop: the side of the window that is kept, as a share of the whole.
        max_brightness: brighter or darker by this share.
    """

    mirror: bool = True
    max_degrees: float = 10.0
    min_crop: float = 0.85
    max_brightness: float = 0.2


DEFAULT_AUGMENTATION = Augmentation()


def augment(image: Pixels, image_id: str, copy: int, how: Augmentation = DEFAULT_AUGMENTATION) -> Pixels:
    """Copy number `copy` of an image (H, W, 3) uint8, of the same shape; the same arguments give the same pixels.

    What a turned window shows beyond the edge repeats the edge.
    """
    generator = np.random.default_rng([copy, *image_id.encode()])
    mirrored = how.mirror and generator.random() < 0.5  # noqa: PLR2004
    angle = radians(generator.uniform(-how.max_degrees, how.max_degrees))
    side = generator.uniform(how.min_crop, 1.0)
    shift = generator.uniform(-0.5, 0.5, 2) * (1.0 - side)  # the window's centre stays where the window is inside
    light = 1.0 + generator.uniform(-how.max_brightness, how.max_brightness)
    height, width, _ = image.shape
    margin = max(height, width) // 2  # a turned window reaches at most so far beyond the edge
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
