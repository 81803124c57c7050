"""What the tests of this folder take their real input in."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from models.arrays import Features


@dataclass(frozen=True)
class Digits:
    """Real images, what they show, and the default backbone's features (N, 1280) of them."""

    images: list[bytes]
    labels: list[str]
    features: Features


def copy_bundle(source: Path, target: Path) -> Path:
    """A bundle to spoil. Its files are hard links: replace one, never write into it."""
    return shutil.copytree(source, target, copy_function=os.link)
