"""How many images per second does one core decode and resize, compared with plain Pillow?"""

import io
from collections.abc import Iterator

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from benchmarks.pairs import Pair, pair
from models.decode import decode

SIZE = (224, 224)
CASES = {  # format and pixels → (images, aim)
    ("JPEG", (300, 300)): (64, 1.0),
    ("JPEG", (1024, 1024)): (16, 1.5),
    ("JPEG", (4000, 3000)): (3, 1.5),
    ("WEBP", (300, 300)): (64, 0.7),  # decoded in the guarded process
    ("TIFF", (300, 300)): (64, 0.2),  # likewise, while Pillow only copies
}


def questions() -> Iterator[Pair]:
    photograph = Image.fromarray(load_sample_images().images[0])
    for (image_format, size), (count, aim) in CASES.items():
        buffer = io.BytesIO()
        options = {"quality": 90} if image_format == "JPEG" else {}
        photograph.resize(size).save(buffer, image_format, **options)
        data = buffer.getvalue()

        def ours(data: bytes = data, count: int = count) -> None:
            for _ in range(count):
                decode(data, SIZE)

        def plain(data: bytes = data, count: int = count) -> None:
            for _ in range(count):
                image = Image.open(io.BytesIO(data)).convert("RGB")
                np.asarray(image.resize(SIZE, Image.Resampling.BILINEAR))

        what = f"decode {size[0]}×{size[1]} {image_format}, against Pillow"
        yield pair(what, "images/s", aim, count, ours, plain)
