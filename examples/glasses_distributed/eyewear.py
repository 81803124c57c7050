"""Drawing glasses with random rims and clear, tinted or mirrored lenses."""

from dataclasses import dataclass

import numpy as np

from examples.glasses_distributed.drawing import Colour, Pen, Points, any_colour, ellipse, mix, superellipse
from examples.glasses_distributed.head import Look

DARK, LIGHT = (15, 15, 18), (248, 246, 240)
TINTED, MIRRORED = 0.15, 0.1  # of all glasses


@dataclass(frozen=True)
class Frame:
    """The position of the lenses, in half widths of the face, and the style of the rim."""

    x: float
    y: float
    width: float
    height: float
    power: float  # of the superellipse: 2 is round, 5 nearly a rectangle
    rim: float
    colour: Colour
    lens: Colour


def draw_glasses(rng: np.random.Generator, pen: Pen, look: Look) -> None:
    """Draw lenses, rims, bridge and temples."""
    frame = _choose(rng, look)
    for side in (-1, 1):
        outline = superellipse(side * frame.x, frame.y, frame.width, frame.height, frame.power)
        pen.fill(outline, frame.lens)
        _glare(rng, pen, frame, side)
        pen.line(outline, frame.colour, frame.rim, closed=True)
        outer = side * (frame.x + frame.width)
        arm = np.array([[outer, frame.y - frame.height * 0.4], [side * 1.0, frame.y - rng.uniform(0, 0.12)]])
        pen.line(arm, frame.colour, frame.rim)
    pen.line(_bridge(frame), frame.colour, frame.rim)


def _choose(rng: np.random.Generator, look: Look) -> Frame:
    width = rng.uniform(0.24, 0.31)
    # Rims usually contrast with the skin, and are darker as often as lighter.
    tone = DARK if rng.uniform(90, 170) < np.mean(look.skin) else LIGHT
    kind = rng.random()
    if kind < TINTED:
        lens = (*mix(DARK, any_colour(rng, 0, 120), 0.5), int(rng.integers(150, 256)))
    elif kind < TINTED + MIRRORED:
        lens = (*mix(LIGHT, any_colour(rng, 140), 0.5), int(rng.integers(150, 256)))
    else:
        lens = (255, 255, 255, int(rng.integers(0, 40)))
    return Frame(
        x=look.eye_x + rng.uniform(-0.02, 0.03),
        y=look.eye_y + rng.uniform(0, 0.08),
        width=width,
        height=width * rng.uniform(0.68, 1.0),
        power=rng.uniform(1.9, 5),
        rim=rng.uniform(0.05, 0.11),
        colour=mix(tone, any_colour(rng), rng.uniform(0, 0.35)),
        lens=lens,
    )


def _glare(rng: np.random.Generator, pen: Pen, frame: Frame, side: int) -> None:
    if rng.random() < 0.4:  # noqa: PLR2004
        first = rng.uniform(0, np.pi)
        arc = ellipse(side * frame.x, frame.y, frame.width * 0.65, frame.height * 0.6, first, first + 1)
        pen.line(arc, (255, 255, 255, 150), 0.04)


def _bridge(frame: Frame) -> Points:
    inner = frame.x - frame.width
    return ellipse(0, frame.y - frame.height * 0.1, inner, 0.1, np.pi, 2 * np.pi)
