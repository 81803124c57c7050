"""What the tests of this folder take their real input in."""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.arrays import Features
from models.bundle import MANIFEST


@dataclass(frozen=True)
class Digits:
    """Real images, what they show, and the default backbone's features (N, 1280) of them."""

    images: list[bytes]
    labels: list[str]
    features: Features


def copy_bundle(source: Path, target: Path) -> Path:
    """A bundle to spoil. Its files are hard links: replace one, never write into it."""
    return shutil.copytree(source, target, copy_function=os.link)


def replace_file(bundle: Path, name: str, content: bytes) -> None:
    """Put another file in the place of one, which may be a link to the original bundle's."""
    (bundle / name).unlink(missing_ok=True)
    (bundle / name).write_bytes(content)


def seal(bundle: Path, **fields: Any) -> None:
    """Make a spoilt bundle's hashes right again, and set manifest fields (`stage__field` for one inside a stage)."""
    content = json.loads((bundle / MANIFEST).read_bytes())
    for name, value in fields.items():
        *stage, field = name.split("__")
        (content[stage[0]] if stage else content)[field] = value
    for name in content["files"]:
        content["files"][name] = hashlib.sha256((bundle / name).read_bytes()).hexdigest()
    replace_file(bundle, MANIFEST, json.dumps(content).encode())
