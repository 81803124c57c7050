"""Decoding an image whose header was checked to pixels, in the calling process."""

from collections.abc import Callable
from functools import cache
from io import BytesIO
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, UnidentifiedImageError

from models.bad_image import BadImage, Limits, Reason, Stage
from models.image_header import Header, too_many_pixels

Resize = Literal["stretch", "crop"]
Whole = Literal["whole"]  # at the image's own size
Pixels = NDArray[np.uint8]

_MAX_DETAIL = 200  # characters
_MAX_BOXES = 1_000
_JPEG_END_WINDOW = 64  # cameras append a few bytes after the end marker
_EOI = b"\xff\xd9"
# Stands in for missing data: pixels that depend on it differ from those that a decoder makes up.
_FILLER = bytes(range(1, 251)) * 4
_ROWWISE = ("PNG", "BMP", "TIFF")  # formats of which Pillow keeps the rows decoded before the data ended
# A damaged image may lack an eighth of its rows, but no more than 32 or one in fifty: a JPEG without its last few bytes
# lacks one or two rows of blocks of 16 pixels.
_MAX_MISSING_SHARE = 1 / 8
_MAX_MISSING_ROWS = 32
_MAX_MISSING_OF_MANY = 1 / 50

_ORIENTATION_TAG = 0x0112
_UPRIGHT: dict[int, Callable[[Pixels], Pixels]] = {  # EXIF orientation → its inverse
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: pixels.swapaxes(0, 1)[:, ::-1],
    7: lambda pixels: pixels.swapaxes(0, 1)[::-1, ::-1],
    8: lambda pixels: pixels.swapaxes(0, 1)[::-1],
}
_SIDEWAYS = (5, 6, 7, 8)
_GRAY = 2  # dimensions
# Up to this scale factor, plain bilinear sampling skips no pixels, and takes an eighth of the time of Pillow's filter,
# whose width is proportional to the factor.
_NEAR = 1.5
_CONVERTIBLE = ("1", "P", "CMYK", "YCbCr", "HSV", "RGBX")
_BAND_PIXELS = 4_000_000  # composited over white at a time


class Picture(NamedTuple):
    """Pixels (height, width, 3), uint8, read-only; and the damage of the file, if it was decoded despite it."""

    pixels: Pixels
    damage: str | None = None


class TruncatedError(OSError):
    """The data ends before the pixels; the number of missing rows was not determined."""


class _UnsupportedModeError(ValueError):
    """Pixels of a mode that has no defined conversion to 8-bit RGB."""


def decode_pixels(
    header: Header, image_format: str, size: tuple[int, int], limits: Limits, resize: Resize | Whole, *, repair: bool
) -> Picture | BadImage:
    """Decode an image.

    Args:
        size: (height, width) of the result.
        repair: whether to decode an image whose data ends early, and count its missing rows, in twice the time and
            memory.

    Raises:
        TruncatedError: the data ends early, and `repair` is False.
        MemoryError: not enough memory.
    """
    stage = Stage.DECODE
    damage = header.damage
    try:
        if header.cut and image_format == "JPEG":
            image, missing = _repaired_jpeg(header.data, size, limits)
            damage = missing or damage
        else:
            image = _open(header.data, image_format, size, limits)
            try:
                image.load()
            except OSError as error:
                if image_format not in _ROWWISE or "truncated" not in str(error) or limits.strict:
                    raise
                if not repair:
                    raise TruncatedError from error
                image, damage = _repaired_rows(header.data, image_format, size, limits, error)
        stage = Stage.PREPROCESS
        return Picture(shape_pixels(image, size, resize, header.orientation), damage)
    except (TruncatedError, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001 decoders raise exceptions of any type for hostile bytes
        return explain(error, stage, header.data, image_format)


def _open(data: bytes, image_format: str, size: tuple[int, int], limits: Limits) -> Image.Image:
    image = Image.open(BytesIO(data), formats=(image_format,))
    if excess := too_many_pixels(image.width, image.height, limits.max_pixels):
        raise Image.DecompressionBombError(excess)
    # A JPEG is decoded at 1/2, 1/4 or 1/8 if that still covers the target in either orientation.
    image.draft("RGB", (max(size), max(size)))
    return image


def _repaired_jpeg(data: bytes, size: tuple[int, int], limits: Limits) -> tuple[Image.Image, str | None]:
    """Decode a JPEG without its end marker, and describe the missing rows.

    Decoders make up missing pixels. So the image is decoded twice with different data in place of the missing end: the
    rows that differ were made up.
    """
    data = data.rstrip(b"\xff")  # with the filler, half of a two-byte code would be a marker that ends the pixels
    image, other = (_open(data + more + _EOI, "JPEG", size, limits) for more in (b"", _FILLER))
    image.load()
    try:
        other.load()
    except OSError as error:
        raise TruncatedError("image file is truncated") from error
    return image, _missing_rows(np.asarray(image), np.asarray(other), bottom_up=False)


def _repaired_rows(
    data: bytes, image_format: str, size: tuple[int, int], limits: Limits, error: OSError
) -> tuple[Image.Image, str | None]:
    """Decode an image whose data ends early, and describe the missing rows: those that decoding does not change."""
    images = []
    try:
        ImageFile.LOAD_TRUNCATED_IMAGES = True
        for filled in (False, True):
            image = _open(data, image_format, size, limits)
            if filled:
                value = 255 if image.mode in ("P", "1") else "white"
                image.im = Image.new(image.mode, image.size, value).im
            image.load()
            images.append(image)
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = False
    one, other = (np.asarray(image) for image in images)
    missing = _missing_rows(one, other, bottom_up=image_format == "BMP")
    if missing is None:  # all rows are present: the error has another cause
        raise error
    return images[0], missing


def _missing_rows(one: NDArray[np.generic], other: NDArray[np.generic], *, bottom_up: bool) -> str | None:
    """Describe the rows that differ and those stored after them; None if there are none.

    Raises OSError if there are too many.
    """
    rows = len(one)
    differ = np.flatnonzero((one != other).reshape(rows, -1).any(axis=1))
    if not len(differ):
        return None
    missing = int(differ[-1]) + 1 if bottom_up else rows - int(differ[0])
    if missing > min(rows * _MAX_MISSING_SHARE, max(_MAX_MISSING_ROWS, rows * _MAX_MISSING_OF_MANY)):
        raise OSError(f"image file is truncated: {missing} of {rows} rows are missing")
    return f"{missing} of {rows} rows are missing"


def explain(error: Exception, stage: Stage, data: bytes, image_format: str) -> BadImage:
    """The reason why an image cannot be decoded, from its decoder's exception."""
    # Pillow's own message for an unreadable header contains the address of an object.
    said = "its header cannot be read" if isinstance(error, UnidentifiedImageError) else str(error)
    detail = f"{image_format}: {said or type(error).__name__}"[:_MAX_DETAIL]
    message = said.lower().replace("_", " ")
    if isinstance(error, _UnsupportedModeError):
        reason = Reason.UNSUPPORTED_MODE
    elif isinstance(error, Image.DecompressionBombError) or "text chunk" in message:
        reason = Reason.DECOMPRESSION_BOMB
    elif "out of memory" in message:
        reason = Reason.DECODE_MEMORY
    elif "truncated" in message or is_cut_off(data, image_format):
        reason = Reason.TRUNCATED
    else:
        reason = Reason.CORRUPT
    return BadImage(stage, reason, detail)


def is_cut_off(data: bytes, image_format: str) -> bool:
    """Whether bytes that cannot be decoded also lack the end required by their format."""
    match image_format:
        case "JPEG":
            whole = _EOI in data[-_JPEG_END_WINDOW:]
        case "PNG":
            whole = b"IEND" in data[-12:]
        case "GIF":
            whole = data.rstrip(b"\0").endswith(b";")
        case "WEBP":
            whole = 8 + int.from_bytes(data[4:8], "little") <= len(data)
        case "BMP":
            whole = int.from_bytes(data[2:6], "little") <= len(data)
        case "TIFF":
            directory = int.from_bytes(data[4:8], "little" if data.startswith(b"I") else "big")
            whole = directory + 2 <= len(data)
        case "AVIF" | "HEIF":
            whole = _boxes_are_complete(data)
        case _:
            whole = True
    return not whole


def _boxes_are_complete(data: bytes) -> bool:
    """Whether the boxes of an ISO base media file (ISO/IEC 14496-12) end within the file."""
    at = 0
    for _ in range(_MAX_BOXES):
        size = int.from_bytes(data[at : at + 4])
        if size < 8 or at + size >= len(data):  # noqa: PLR2004  0: extends to the end, 1: a 64-bit size follows
            break
        at += size
    return at + int.from_bytes(data[at : at + 4]) <= len(data)


def shape_pixels(
    image: Image.Image, size: tuple[int, int], resize: Resize | Whole, orientation: int | None = None
) -> Pixels:
    """Convert to 8 bits, resize and rotate upright, in this order, so that the later steps process few pixels.

    Args:
        image: the image, loaded or not.
        size: (height, width).
        orientation: the EXIF orientation, 1 to 8; None to read it from the image.

    Returns:
        (height, width, 3), uint8, read-only.
    """
    height, width = (image.height, image.width) if resize == "whole" else size
    if orientation is None:
        orientation = _read_orientation(image)
    if orientation in _SIDEWAYS and resize != "whole":
        height, width = width, height
    image = _to_eight_bits(image)
    if resize == "crop":  # not by resize(box=…), whose filter also reads pixels outside the box
        image = image.crop(centred_box(image.width, image.height, width, height))
    if max(image.width / width, image.height / height) > _NEAR:
        image = image.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=2.0)
    pixels = np.asarray(image)
    if pixels.shape[:2] != (height, width):
        cv2 = opencv()
        pixels = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_LINEAR)
    if orientation in _UPRIGHT:
        pixels = _UPRIGHT[orientation](pixels)
    if pixels.ndim == _GRAY:
        pixels = np.repeat(pixels[..., np.newaxis], 3, axis=2)
    pixels.flags.writeable = False
    return pixels


def _read_orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 if the metadata is unreadable.

    Pillow itself rotates a TIFF upright while loading, and removes the tag.
    """
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # noqa: BLE001 metadata parsers raise exceptions of any type
        return 1


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """An image of mode L or RGB, of the same size."""
    if image.mode in ("L", "RGB") and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16"):
        return Image.fromarray(_scale_to_eight_bits(np.asarray(image)))
    if image.has_transparency_data:
        return _over_white(image)
    if image.mode in _CONVERTIBLE:
        return image.convert("L" if image.mode == "1" else "RGB")
    raise _UnsupportedModeError(f"pixels of mode {image.mode} have no defined range to scale to 8 bits")


def _over_white(image: Image.Image) -> Image.Image:
    """Composite an image over white, in bands, because that needs four times the memory of its input."""
    whole = Image.new("RGB", image.size)
    rows = max(1, _BAND_PIXELS // image.width)
    for top in range(0, image.height, rows):
        band = image.crop((0, top, image.width, min(top + rows, image.height)))
        band = (band.convert("LA") if band.mode == "La" else band).convert("RGBA")
        white = Image.new("RGBA", band.size, "white")
        whole.paste(Image.alpha_composite(white, band).convert("RGB"), (0, top))
    return whole


def _scale_to_eight_bits(pixels: NDArray[np.uint16]) -> Pixels:
    """0..65535 to 0..255, rounded: 65535 = 255 * 257."""
    return ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)


def centred_box(image_width: int, image_height: int, width: int, height: int) -> tuple[int, int, int, int]:
    """The largest centred window of the aspect width:height, as (left, top, right, bottom) in whole pixels."""
    scale = min(image_width / width, image_height / height)
    box_width, box_height = max(1, round(width * scale)), max(1, round(height * scale))
    left, top = (image_width - box_width) // 2, (image_height - box_height) // 2
    return left, top, left + box_width, top + box_height


@cache
def opencv() -> Any:
    """OpenCV, imported late: reading headers and shrinking images do not need it."""
    import cv2

    cv2.setNumThreads(1)  # workers use one core each
    return cv2
