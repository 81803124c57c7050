"""Shrinking of images before they are published; keeps aspect ratio and orientation, and drops metadata.

Images that are small enough, or that cannot be decoded within the limits, are left unchanged.
"""

import warnings
from io import BytesIO

from PIL import Image, ImageOps

from models.bad_image import DEFAULT_LIMITS, BadImage, Limits
from models.guarded import run_guarded
from models.image_header import read_header, sniff, too_many_pixels

JPEG_QUALITY = 90
RESIZABLE = ("RGB", "RGBA", "L", "CMYK", "I;16")  # modes that are resized without conversion


def shrink(data: bytes, max_side: int, limits: Limits = DEFAULT_LIMITS) -> bytes:
    """Shrink an encoded image so that no side is longer than `max_side` pixels.

    The result is a JPEG, or a PNG if the image has transparency or 16-bit gray; of an animation, the first frame. EXIF
    orientation is applied, the colour profile is kept, and other metadata, such as the location, is dropped.

    Args:
        max_side: in pixels.
        limits: bounds on decoding; `max_bytes` is ignored.

    Returns:
        The shrunk image; `data` itself if it is small enough, of an unknown format, or exceeds a limit.
    """
    found = sniff(data)
    if found is None or found.format not in limits.formats:
        return data
    if read_header(data, found, (max_side, max_side), limits.max_pixels).excess:
        return data
    request = {"operation": "shrink", "format": found.format, "max_side": max_side, "max_pixels": limits.max_pixels}
    answer = run_guarded(request, data[found.start :], limits)
    return data if isinstance(answer, BadImage) or not answer[0]["shrunk"] else answer[1]


def shrink_pixels(data: bytes, image_format: str, max_side: int, max_pixels: int) -> bytes | None:
    """Shrink an image in this process; None if it is small enough or cannot be decoded.

    Raises:
        MemoryError: not enough memory.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd metadata, and sizes between Pillow's two limits
        try:
            with Image.open(BytesIO(data), formats=(image_format,)) as image:
                if max(image.size) <= max_side or too_many_pixels(*image.size, max_pixels):
                    return None
                return _shrunk(image, max_side)
        except MemoryError:
            raise
        # For invalid images, Pillow's decoders raise exceptions of any type, including struct.error and SyntaxError.
        except Exception:  # noqa: BLE001
            return None


def _shrunk(image: Image.Image, max_side: int) -> bytes:
    profile = image.info.get("icc_profile")
    if image.mode not in RESIZABLE:  # palette indices cannot be averaged
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    # A JPEG is decoded at 1/2, 1/4 or 1/8 of its size if that is at least twice the target.
    image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS, reducing_gap=2.0)
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "CMYK":
        image, profile = image.convert("RGB"), None
    encoded = BytesIO()
    if image.has_transparency_data or image.mode == "I;16":
        image.save(encoded, "PNG", icc_profile=profile, exif=b"")
    else:
        image.save(encoded, "JPEG", quality=JPEG_QUALITY, icc_profile=profile)
    return encoded.getvalue()
