"""Photographs made smaller before they are sent: aspect and orientation kept, metadata left behind.

Only images larger than asked for are touched, and what cannot be decoded within the limits is sent as it is: the
stream decides on it.
"""

import warnings
from io import BytesIO

from PIL import Image, ImageOps

from models.bad_image import DEFAULT_LIMITS, BadImage, Limits
from models.guarded import run_guarded
from models.image_header import read_header, sniff, too_many_pixels

JPEG_QUALITY = 90
RESIZABLE = ("RGB", "RGBA", "L", "CMYK", "I;16")  # modes that are resized as they are


def shrink(data: bytes, max_side: int, limits: Limits = DEFAULT_LIMITS) -> bytes:
    """The encoded image with no side longer than `max_side` pixels; `data` itself where that holds already.

    It becomes a JPEG, or a PNG where it has transparency or 16-bit gray; of an animation the first frame stays. EXIF
    orientation is applied, other metadata (the place a photograph was taken at, too) is dropped, the colour profile is
    kept. Returns `data` itself as well if it is not an image of a known format or exceeds a limit, whose `max_bytes`
    does not count here.
    """
    found = sniff(data)
    if found is None or found.format not in limits.formats:
        return data
    if read_header(data, found, (max_side, max_side), limits.max_pixels).excess:
        return data
    request = {
        "operation": "shrink",
        "format": found.format,
        "max_side": max_side,
        "max_pixels": limits.max_pixels,
    }
    answer = run_guarded(request, data[found.start :], limits)
    return data if isinstance(answer, BadImage) or not answer[0]["shrunk"] else answer[1]


def shrink_pixels(data: bytes, image_format: str, max_side: int, max_pixels: int) -> bytes | None:
    """The image made smaller, in this process; None if it is small enough, or cannot be decoded.

    Raises MemoryError if there is not enough.
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
        # Bytes that are not a sound image make Pillow's decoders raise anything, struct.error and SyntaxError too.
        except Exception:  # noqa: BLE001
            return None


def _shrunk(image: Image.Image, max_side: int) -> bytes:
    profile = image.info.get("icc_profile")
    if image.mode not in RESIZABLE:  # a palette's numbers cannot be averaged
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    # A JPEG is decoded at 1/2, 1/4 or 1/8 of its size where that is still twice what is wanted.
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
