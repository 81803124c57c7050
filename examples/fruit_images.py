"""Generated images in the layout of Fruits-360: a folder per class with JPEGs of 100×100, a rotated fruit on white.

Folder names contain spaces, accents, apostrophes, and trailing numbers for varieties of a fruit, as real ones do. The
original's images are photographs: https://github.com/fruits-360, licence CC BY-SA 4.0.
"""

import colorsys
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

SIDE = 100
SCALE = 2  # drawn at twice the size for antialiasing
JPEG_QUALITY = 90
SEED = 360

Colour = tuple[int, int, int]
Point = NDArray[np.float64]  # (2,) across and down, in pixels
Skin = Literal["plain", "striped", "spotted", "cluster"]


@dataclass(frozen=True)
class Fruit:
    """A class of fruit.

    Attributes:
        folder: the name of its folder.
        hue: of the skin, in turns.
        ratio: width over height.
        light: lightness of the skin, from 0 to 1.
        skin: the pattern of the skin.
    """

    folder: str
    hue: float
    ratio: float = 1.0
    light: float = 0.5
    skin: Skin = "plain"


FRUITS = (
    Fruit("Apple Braeburn", 0.99, 1.05, 0.42),
    Fruit("Apple Golden 1", 0.16, 1.05, 0.55),
    Fruit("Apple Golden 2", 0.19, 0.95, 0.50),
    Fruit("Açaí", 0.76, 1.0, 0.18, "cluster"),
    Fruit("Banane d'Équateur", 0.15, 0.32, 0.52),
    Fruit("Cherry Wax Black_1", 0.95, 1.0, 0.15),
    Fruit("Cherry Wax Black_2", 0.97, 0.8, 0.24, "spotted"),
    Fruit("Citron vert", 0.30, 0.75, 0.38),
    Fruit("Clémentine", 0.07, 1.1, 0.50, "spotted"),
    Fruit("Cocos", 0.08, 0.95, 0.25, "striped"),
    Fruit("Crème de Mûres", 0.80, 1.0, 0.35, "cluster"),
    Fruit("Grape Blue", 0.64, 1.0, 0.40, "cluster"),
    Fruit("Grape White_1", 0.22, 1.0, 0.60, "cluster"),
    Fruit("Grape White_2", 0.25, 0.7, 0.50, "cluster"),
    Fruit("Jalapeño", 0.36, 0.35, 0.30),
    Fruit("Kiwi", 0.09, 0.8, 0.32, "spotted"),
    Fruit("Limón_1", 0.155, 0.72, 0.58),
    Fruit("Limón_2", 0.14, 0.6, 0.62, "spotted"),
    Fruit("Maçã Verde", 0.33, 1.0, 0.55),
    Fruit("Myrtille", 0.62, 1.0, 0.25, "spotted"),
    Fruit("Pastèque", 0.38, 1.25, 0.32, "striped"),
    Fruit("Pêche de vigne 2", 0.02, 1.0, 0.62),
    Fruit("Piña", 0.11, 0.6, 0.45, "striped"),
    Fruit("Quetsche", 0.72, 0.6, 0.30),
)


def write_fruits(folder: Path, per_class: int = 30) -> Path:
    """Write `per_class` images of each of `FRUITS` into `folder`, deterministically, and return the folder."""
    for number, fruit in enumerate(FRUITS):
        directory = folder / fruit.folder
        directory.mkdir(parents=True, exist_ok=True)
        generator = np.random.default_rng((SEED, number))
        for picture in range(per_class):
            image = draw_fruit(fruit, generator)
            image.save(directory / f"{3 * picture}_{SIDE}.jpg", quality=JPEG_QUALITY)
    return folder


def draw_fruit(fruit: Fruit, generator: np.random.Generator) -> Image.Image:
    """Draw one image, (SIDE, SIDE) RGB, with random rotation and small changes of size and lightness."""
    side = SIDE * SCALE
    image = Image.new("RGB", (side, side), "white")
    draw = ImageDraw.Draw(image)
    size = side * generator.uniform(0.36, 0.43)
    width, height = size * min(1.0, fruit.ratio), size / max(1.0, fruit.ratio)
    light = fruit.light + generator.normal(0, 0.03)
    skin = _rgb(fruit.hue + generator.normal(0, 0.006), light)
    centre = side / 2 + generator.normal(0, 2.0, 2)
    if fruit.skin == "cluster":
        _berries(draw, fruit, generator, centre, (width, height), light)
    else:
        _ellipse(draw, centre, width, height, skin)
        _marks(draw, fruit, generator, centre, (width, height), light)
    shine = centre - (0.35 * width, 0.4 * height)
    _ellipse(draw, shine, 0.16 * width, 0.16 * height, _rgb(fruit.hue, min(0.95, light + 0.3)))
    stem = (centre[0], centre[1] - 0.95 * height, centre[0] + 6, centre[1] - 1.15 * height)
    draw.line(stem, fill=(94, 66, 32), width=3 * SCALE)
    turned = image.rotate(float(generator.uniform(0, 360)), resample=Image.Resampling.BILINEAR, fillcolor="white")
    return turned.filter(ImageFilter.GaussianBlur(1)).resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def _marks(
    draw: ImageDraw.ImageDraw,
    fruit: Fruit,
    generator: np.random.Generator,
    centre: Point,
    radii: tuple[float, float],
    light: float,
) -> None:
    """Draw spots or stripes on the skin."""
    width, height = radii
    dark = _rgb(fruit.hue, max(0.05, light - 0.14))
    if fruit.skin == "spotted":
        for _ in range(18):
            _ellipse(draw, _random_point(generator, centre, (0.85 * width, 0.85 * height)), 4, 4, dark)
    if fruit.skin == "striped":
        for offset in (-0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75):
            half = 0.92 * height * math.sqrt(1 - offset**2)
            across = centre[0] + offset * width
            draw.line((across, centre[1] - half, across, centre[1] + half), fill=dark, width=3 * SCALE)


def _berries(
    draw: ImageDraw.ImageDraw,
    fruit: Fruit,
    generator: np.random.Generator,
    centre: Point,
    radii: tuple[float, float],
    light: float,
) -> None:
    """Draw a cluster of small fruits."""
    width, height = radii
    for _ in range(30):
        place = _random_point(generator, centre, (0.8 * width, 0.8 * height))
        berry = 0.2 * max(width, height)
        _ellipse(draw, place, berry * fruit.ratio, berry, _rgb(fruit.hue, light + generator.normal(0, 0.06)))


def _random_point(generator: np.random.Generator, centre: Point, radii: tuple[float, float]) -> Point:
    """A uniformly distributed point of the ellipse."""
    radius, angle = math.sqrt(generator.uniform()), generator.uniform(0, 2 * math.pi)
    return centre + radius * np.array(radii) * (math.cos(angle), math.sin(angle))


def _ellipse(draw: ImageDraw.ImageDraw, centre: Point, width: float, height: float, fill: Colour) -> None:
    across, down = map(float, centre)
    draw.ellipse((across - width, down - height, across + width, down + height), fill=fill)


def _rgb(hue: float, light: float, saturation: float = 0.75) -> Colour:
    red, green, blue = colorsys.hls_to_rgb(hue % 1, min(0.95, max(0.05, light)), saturation)
    return round(255 * red), round(255 * green), round(255 * blue)
