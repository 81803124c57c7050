"""Drawing a random head: skin, hair, features, beard, hat and make-up."""

from dataclasses import dataclass

import numpy as np

from examples.glasses_distributed.drawing import Colour, Pen, any_colour, ellipse, mix, superellipse

SKINS = ((255, 224, 196), (241, 194, 150), (224, 172, 125), (198, 134, 90), (141, 85, 50), (90, 56, 37))
HAIRS = ((20, 16, 14), (60, 40, 26), (110, 74, 40), (160, 60, 30), (214, 178, 110), (190, 190, 190), (240, 238, 232))
IRISES = ((60, 40, 25), (70, 110, 60), (70, 110, 160), (110, 90, 60), (40, 40, 45))
WHITE, BLACK = (240, 238, 235), (15, 12, 12)
BEARD, MOUSTACHE, LONG_HAIR, BALD, FRINGE, HAT = 0.2, 0.25, 0.45, 0.15, 0.4, 0.3  # of all heads
MAKE_UP, EAR_RINGS, LINES, FRECKLES, SCAR, SHUT = 0.2, 0.3, 0.5, 0.2, 0.25, 0.15


@dataclass(frozen=True)
class Look:
    """Parameters shared by the parts of a head."""

    skin: Colour
    hair: Colour
    height: float  # half heights and distances in half widths of the face
    jaw: float
    eye_x: float
    eye_y: float
    hat: bool
    bald: bool


def look_of(rng: np.random.Generator) -> Look:
    one, other = (SKINS[index] for index in rng.integers(0, len(SKINS), 2))
    dark, light = (HAIRS[index] for index in rng.integers(0, len(HAIRS), 2))
    return Look(
        skin=mix(one, other, rng.uniform(0, 0.5)),
        hair=mix(dark, light, rng.uniform(0, 0.4)),
        height=rng.uniform(1.2, 1.4),
        jaw=rng.uniform(1.9, 2.6),
        eye_x=rng.uniform(0.36, 0.42),
        eye_y=rng.uniform(-0.16, -0.08),
        hat=bool(rng.random() < HAT),
        bald=bool(rng.random() < BALD),
    )


def draw_head(rng: np.random.Generator, pen: Pen, look: Look) -> None:
    """Draw everything behind the glasses."""
    _draw_behind(rng, pen, look)
    pen.fill(superellipse(0, 0, 1, look.height, look.jaw), look.skin)
    _draw_marks(rng, pen, look)
    for side in (-1, 1):
        _draw_eye(rng, pen, look, side)
    _draw_brows(rng, pen, look)
    _draw_nose(rng, pen, look)
    _draw_mouth_and_beard(rng, pen, look)


def draw_front(rng: np.random.Generator, pen: Pen, look: Look) -> None:
    """Draw everything in front of the glasses: fringe, hat and brim."""
    top = -look.height
    if not look.bald and rng.random() < FRINGE:
        depth = rng.uniform(0.25, 0.75)
        pen.fill(superellipse(rng.uniform(-0.3, 0.3), top + 0.1, 0.95, depth, 2.2), look.hair)
    if look.hat:
        colour = any_colour(rng)
        line = top + rng.uniform(0.35, 0.6)
        pen.fill(superellipse(0, line, 1.12, rng.uniform(0.6, 0.9), 2.4, np.pi, 2 * np.pi), colour)
        band = np.array([[-1.12, line], [1.12, line]])
        pen.line(band, mix(colour, any_colour(rng), 0.7), rng.uniform(0.06, 0.25))
        if rng.random() < 0.4:  # noqa: PLR2004  a brim
            pen.line(band * [1.35, 1], colour, rng.uniform(0.06, 0.12))


def _draw_behind(rng: np.random.Generator, pen: Pen, look: Look) -> None:
    """Draw shoulders, neck, ears and long hair."""
    shade = mix(look.skin, BLACK, rng.uniform(0.1, 0.35))
    pen.fill(superellipse(0, 2.6, rng.uniform(1.5, 2.2), 1.1, 2.5), any_colour(rng))
    if not look.bald:
        length = look.height * (rng.uniform(1.1, 1.5) if rng.random() < LONG_HAIR else 0.75)
        pen.fill(superellipse(0, -0.2, rng.uniform(1.08, 1.35), length, 2.4), look.hair)
    pen.fill(superellipse(0, 1.3, rng.uniform(0.45, 0.6), 0.6, 4), shade)
    for side in (-1, 1):
        pen.fill(ellipse(side * 1.02, 0, 0.14, 0.24), shade)
    if rng.random() < EAR_RINGS:
        colour, radius = any_colour(rng), rng.uniform(0.06, 0.18)
        for side in (-1, 1):
            pen.line(ellipse(side * 1.06, 0.24 + radius, radius, radius), colour, 0.04, closed=True)


def _draw_marks(rng: np.random.Generator, pen: Pen, look: Look) -> None:
    """Draw cheeks, freckles, wrinkles, scars and paint: lines that could be mistaken for glasses."""
    flush = mix(look.skin, (220, 80, 80), rng.uniform(0, 0.3))
    for side in (-1, 1):
        pen.fill(ellipse(side * 0.55, 0.4, 0.25, 0.2), (*flush, 90))
    if rng.random() < FRECKLES:
        spots = rng.uniform([-0.8, -0.2], [0.8, 0.6], (12, 2))
        for x, y in spots:
            pen.fill(ellipse(x, y, 0.025, 0.025), mix(look.skin, (90, 45, 20), 0.6))
    if rng.random() < LINES:
        for row in range(rng.integers(1, 4)):
            y = -0.6 - 0.12 * row
            pen.line(ellipse(0, y, rng.uniform(0.3, 0.6), 0.06, np.pi, 2 * np.pi), mix(look.skin, BLACK, 0.35), 0.03)
    if rng.random() < SCAR:
        start = rng.uniform([-0.8, -0.9], [0.8, 0.9])
        line = np.stack([start, start + rng.uniform(-0.5, 0.5, 2)])
        pen.line(line, mix(look.skin, any_colour(rng), 0.8), rng.uniform(0.03, 0.09))


def _draw_eye(rng: np.random.Generator, pen: Pen, look: Look, side: int) -> None:
    x, y = side * look.eye_x, look.eye_y
    lid = mix(look.skin, BLACK, rng.uniform(0.3, 0.7))
    if rng.random() < MAKE_UP:  # of one eye or both: dark rings or bright shadow, filled, about as large as a lens
        shadow = (*any_colour(rng), int(rng.integers(60, 200)))
        pen.fill(ellipse(x, y, rng.uniform(0.2, 0.3), rng.uniform(0.12, 0.25)), shadow)
    if rng.random() < SHUT:
        pen.line(ellipse(x, y, 0.17, 0.06, 0, np.pi), lid, 0.05)
        return
    height = rng.uniform(0.06, 0.11)
    pen.fill(ellipse(x, y, 0.17, height), WHITE)
    gaze = x + rng.uniform(-0.05, 0.05)
    pen.fill(ellipse(gaze, y, height * 0.9, height * 0.9), IRISES[rng.integers(len(IRISES))])
    pen.fill(ellipse(gaze, y, height * 0.4, height * 0.4), BLACK)
    pen.line(ellipse(x, y, 0.18, height, np.pi, 2 * np.pi), lid, 0.04)
    pen.line(ellipse(x, y + 0.04, 0.17, height + 0.03, 0, np.pi), (*lid, int(rng.integers(0, 160))), 0.03)


def _draw_brows(rng: np.random.Generator, pen: Pen, look: Look) -> None:
    colour = mix(look.hair, BLACK, rng.uniform(0, 0.5))
    height, slope, width = rng.uniform(0.2, 0.36), rng.uniform(-0.08, 0.08), rng.uniform(0.03, 0.13)
    for side in (-1, 1):
        x = side * look.eye_x
        brow = ellipse(x, look.eye_y - height + 0.05, 0.25, rng.uniform(0.02, 0.1), np.pi, 2 * np.pi)
        brow[:, 1] += slope * side * (brow[:, 0] - x) / 0.25
        pen.line(brow, colour, width)


def _draw_nose(rng: np.random.Generator, pen: Pen, look: Look) -> None:
    shade = mix(look.skin, BLACK, rng.uniform(0.15, 0.45))
    end, width = rng.uniform(0.3, 0.42), rng.uniform(0.1, 0.18)
    side = rng.choice([-1, 1])
    pen.line(
        np.array([[side * 0.08, look.eye_y], [side * width, end - 0.06], [0, end]]), shade, rng.uniform(0.02, 0.06)
    )
    for nostril in (-1, 1):
        pen.fill(ellipse(nostril * width * 0.6, end, 0.04, 0.025), mix(shade, BLACK, 0.5))


def _draw_mouth_and_beard(rng: np.random.Generator, pen: Pen, look: Look) -> None:
    y, width = rng.uniform(0.62, 0.74), rng.uniform(0.25, 0.42)
    if rng.random() < BEARD:
        pen.fill(superellipse(0, 0.55, 0.97, look.height - 0.5, 2.3, 0, np.pi), look.hair)
    if rng.random() < MOUSTACHE:
        pen.fill(ellipse(0, y - 0.1, width, 0.09), look.hair)
    lips = mix(look.skin, (170, 40, 50), rng.uniform(0.3, 0.8))
    opened = rng.uniform(0.02, 0.14)
    pen.fill(ellipse(0, y, width, opened + 0.04), lips)
    if opened > 0.07:  # noqa: PLR2004
        pen.fill(ellipse(0, y, width * 0.85, opened), WHITE)
