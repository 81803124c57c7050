"""Generated faces with and without glasses, which a convolution can distinguish and a linear model on pixels cannot.

Everything in which two people, two cameras or two rooms differ is drawn at random: pose, skin, hair, beard, hat,
make-up, background, light, blur and noise. So are the glasses: rims darker than the skin as often as lighter, lenses
clear, tinted or mirrored. So no pixel's mean distinguishes the classes; what does is that two connected outlines
surround the eyes, lighter or darker than the skin.
"""

import csv
from collections.abc import Callable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image
from rich.console import Console
from rich.progress import Progress

from examples.glasses_distributed.drawing import Pen, Pixels, backdrop, develop
from examples.glasses_distributed.eyewear import draw_glasses
from examples.glasses_distributed.head import draw_front, draw_head, look_of

WITH, WITHOUT = "glasses", "no glasses"  # the folders
FACES, LABELS = "faces", "labels.csv"  # in the original layout
QUALITY = 92  # of JPEG files
SEED = 614
UNLABELLED = 0.1  # of the images in the original layout
CANVAS = 256  # minimum size of the drawing in pixels, from which smaller images are scaled down


def face(rng: np.random.Generator, size: int, glasses: bool) -> Pixels:
    """Draw one face, uint8 (size, size, 3), determined by the state of `rng`."""
    pixels = max(CANVAS, size)
    canvas = backdrop(rng, pixels)
    pen = Pen(
        canvas,
        centre=(pixels * (0.5 + rng.uniform(-0.025, 0.025)), pixels * (0.52 + rng.uniform(-0.025, 0.025))),
        unit=pixels * rng.uniform(0.29, 0.33),
        tilt=rng.normal(0, 0.06),
        yaw=rng.uniform(-0.12, 0.12),
        nod=rng.uniform(-0.08, 0.08),
    )
    look = look_of(rng)
    draw_head(rng, pen, look)
    if glasses:
        draw_glasses(rng, pen, look)
    draw_front(rng, pen, look)
    return develop(rng, canvas, size)


def faces(n: int, size: int, seed: int) -> Iterator[tuple[int, bool, Pixels]]:
    """(number from 1, glasses, image) of `n` faces, half of them with glasses; a prefix does not depend on `n`."""
    for pair in range((n + 1) // 2):
        first = bool(np.random.default_rng([seed, pair]).integers(2))
        for number, glasses in ((2 * pair + 1, first), (2 * pair + 2, not first)):
            if number <= n:
                yield number, glasses, face(np.random.default_rng([seed, pair, number]), size, glasses)


def write_folders(folder: Path, n: int, size: int, seed: int, on_image: Callable[[], object] = int) -> Path:
    """Write one folder per class with JPEG files face-N.jpg; returns `folder`."""
    for name in (WITH, WITHOUT):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for number, glasses, picture in faces(n, size, seed):
        path = folder / (WITH if glasses else WITHOUT) / f"face-{number}.jpg"
        Image.fromarray(picture).save(path, quality=QUALITY)
        on_image()
    return folder


def write_original_layout(
    folder: Path, n: int, size: int = 1024, seed: int = SEED, on_image: Callable[[], object] = int
) -> Path:
    """Write the layout of the published set: faces/face-N.png and labels.csv, whose path is returned.

    The CSV's column id has the number in the file's name; its column glasses 1 or 0, and nothing for a tenth of them.
    """
    (folder / FACES).mkdir(parents=True, exist_ok=True)
    undefined = set(np.random.default_rng([seed, n]).permutation(n)[: round(UNLABELLED * n)] + 1)
    with (folder / LABELS).open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["id", "glasses"])
        for number, glasses, picture in faces(n, size, seed):
            Image.fromarray(picture).save(folder / FACES / f"face-{number}.png", compress_level=1)
            rows.writerow([number, "" if number in undefined else int(glasses)])
            on_image()
    return folder / LABELS


class Layout(StrEnum):
    FOLDERS = "folders"
    ORIGINAL = "original"


def main(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder to write to, created if it does not exist.")],
    images: Annotated[int, typer.Option(min=2, help="Number of faces, half of them with glasses.")] = 2_000,
    size: Annotated[int, typer.Option(min=16, max=4_096, help="Size in pixels per side.")] = 128,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random numbers.")] = SEED,
    layout: Annotated[
        Layout, typer.Option(help="Layout: a folder per class, or PNG files in one folder with labels.csv.")
    ] = Layout.FOLDERS,
) -> None:
    """Write faces with and without glasses.

    Example: python -m examples.glasses_distributed.faces faces/ --images 2000 --size 128 --seed 614
    """
    with Progress(console=Console(stderr=True)) as progress:
        shown = progress.add_task(f"{images:,} faces", total=images)
        write = write_folders if layout is Layout.FOLDERS else write_original_layout
        write(folder, images, size, seed, on_image=lambda: progress.advance(shown))
    Console().print(f"{images:,} faces of {size}×{size} in {folder}", highlight=False)


if __name__ == "__main__":
    typer.run(main)
