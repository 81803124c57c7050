"""How many JPEGs a second does one core decode and resize, against Pillow's plain decode and resize?"""

import io
from collections.abc import Iterator

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from benchmarks.pairs import Pair, pair
from models.decode import decode

SIZE = (224, 224)
CASES = {(300, 300): (64, 1.0), (1024, 1024): (16, 1.5), (4000, 3000): (3, 1.5)}  # pixels → (images, aim)


def questions() -> Iterator[Pair]:
    photograph = Image.fromarray(load_sample_images().images[0])
    for (width, height), (count, aim) in CASES.items():
        buffer = io.BytesIO()
        photograph.resize((width, height)).save(buffer, "JPEG", quality=90)
        data = buffer.getvalue()

        def ours(data: bytes = data, count: int = count) -> None:
            for _ in range(count):
                decode(data, SIZE)

        def plain(data: bytes = data, count: int = count) -> None:
            for _ in range(count):
                image = Image.open(io.BytesIO(data)).convert("RGB")
                np.asarray(image.resize(SIZE, Image.Resampling.BILINEAR))

        yield pair(f"decode {width}×{height} JPEG, against Pillow", "images/s", aim, count, ours, plain)
