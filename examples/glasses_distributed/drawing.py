"""Drawing in the coordinates of a head, and simulation of light, lens and sensor."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

Pixels = NDArray[np.uint8]
Points = NDArray[np.float64]  # (N, 2): x to the right, y down
Colour = tuple[int, ...]

CORNERS = 36  # of a drawn circle
GRAINS = 256  # of noise along each side
BELOW = 1.3  # half height of a head, in its half widths


class Pen:
    """Draws polygons and lines given in half widths of a head that is shifted, turned and tilted in the picture.

    Args:
        canvas: an RGB picture, changed in place.
        centre: where the head is, in pixels.
        unit: half the head's width in pixels.
        tilt: of the head towards a shoulder, in radians.
        yaw, nod: how far the middle of the face moves to the side and down when the head turns, in half widths.
    """

    def __init__(
        self, canvas: Image.Image, *, centre: tuple[float, float], unit: float, tilt: float, yaw: float, nod: float
    ) -> None:
        self._draw = ImageDraw.Draw(canvas, "RGBA")  # so that a fill with an alpha is blended
        self._centre, self._unit = np.array(centre), unit
        self._rotation = np.array([[np.cos(tilt), np.sin(tilt)], [-np.sin(tilt), np.cos(tilt)]])
        self._turn = np.array([yaw, nod])

    def fill(self, points: Points, colour: Colour) -> None:
        self._draw.polygon(self._place(points), fill=colour)

    def line(self, points: Points, colour: Colour, width: float, *, closed: bool = False) -> None:
        """`width` in half widths of the head; what is thinner than a pixel is drawn as one."""
        places = self._place(np.vstack([points, points[:2]]) if closed else points)
        self._draw.line(places, fill=colour, width=max(1, round(width * self._unit)), joint="curve")

    def _place(self, points: Points) -> list[tuple[float, float]]:
        """The pixels of points: what is nearer to the middle of the face sticks out, so it moves more as it turns."""
        depth = np.clip(1 - points[:, :1] ** 2 - (points[:, 1:] / BELOW) ** 2, 0, 1)
        placed = self._centre + self._unit * (points + depth * self._turn) @ self._rotation
        return [(float(x), float(y)) for x, y in placed]


def ellipse(x: float, y: float, width: float, height: float, first: float = 0, last: float = 2 * np.pi) -> Points:
    """Points on an ellipse from angle `first` to `last`, clockwise from the right; half width and half height."""
    return superellipse(x, y, width, height, 2, first, last)


def superellipse(
    x: float, y: float, width: float, height: float, power: float, first: float = 0, last: float = 2 * np.pi
) -> Points:
    """The same, on |x|^power + |y|^power = 1: rounder than a rectangle from 2 on, a diamond at 1."""
    angle = np.linspace(first, last, CORNERS)
    across, down = np.cos(angle), np.sin(angle)
    return np.stack(
        [
            x + width * np.sign(across) * np.abs(across) ** (2 / power),
            y + height * np.sign(down) * np.abs(down) ** (2 / power),
        ],
        axis=1,
    )


def mix(one: Sequence[float], other: Sequence[float], share: float) -> Colour:
    """Mix two colours with `share` of the second."""
    return tuple(int((1 - share) * a + share * b) for a, b in zip(one, other, strict=True))


def any_colour(rng: np.random.Generator, low: int = 0, high: int = 256) -> Colour:
    red, green, blue = rng.integers(low, high, 3)
    return int(red), int(green), int(blue)


def backdrop(rng: np.random.Generator, pixels: int) -> Image.Image:
    """Draw an unfocused background: gradients, patches and bars."""
    corners = Image.fromarray(rng.integers(0, 256, (2, 2, 3), np.uint8))
    canvas = corners.resize((pixels, pixels), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(canvas, "RGBA")
    for _ in range(rng.integers(0, 9)):
        colour = (*any_colour(rng), int(rng.integers(40, 200)))
        x, y, width, height = rng.uniform([-0.2, -0.2, 0.02, 0.02], [1, 1, 0.5, 0.8]) * pixels
        shape = pen.ellipse if rng.random() < 0.5 else pen.rectangle  # noqa: PLR2004
        shape((x, y, x + width, y + height), fill=colour)
    return canvas


def develop(rng: np.random.Generator, canvas: Image.Image, size: int) -> Pixels:
    """The image as taken by a camera, uint8 (size, size, 3): lit from one side, blurred, over-exposed, noisy."""
    picture = canvas.resize((size, size), Image.Resampling.BOX)
    picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0, 0.006) * size))
    light = np.asarray(picture, np.float32) / 255
    steps = np.linspace(-1, 1, size, dtype=np.float32)
    angle, strength = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.4)
    light *= (1 + strength * (np.cos(angle) * steps[None, :] + np.sin(angle) * steps[:, None]))[..., None]
    light = (light * np.float32(rng.uniform(0.7, 1.25))).clip(0, 1) ** np.float32(rng.uniform(0.7, 1.4))
    light += np.float32(rng.uniform(0.005, 0.03)) * _grain(rng, size)
    return (light.clip(0, 1) * 255).astype(np.uint8)


def _grain(rng: np.random.Generator, size: int) -> NDArray[np.float32]:
    """Noise of unit variance, float32 (size, size, 3), with `GRAINS` per side, so that scaling down preserves it."""
    grains = min(size, GRAINS)
    nearest = np.arange(size) * grains // size
    return rng.standard_normal((grains, grains, 3), np.float32)[nearest][:, nearest]
