"""Encoded bytes to pixels, or the reason why not.

A bad image is a value, not an exception: it goes to the quarantine with its bytes while the stream goes on. Whatever
the header tells (format, number of pixels) is judged before a pixel is decoded, so that a small file cannot claim
gigabytes of memory.
"""

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from io import BytesIO
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

cv2.setNumThreads(1)  # a worker has one core, and the next worker the next

Resize = Literal["stretch", "crop"]


class Stage(StrEnum):
    """The step on which a message was given up."""

    READ = "read"
    DECODE = "decode"
    PREPROCESS = "preprocess"
    SCORE = "score"


class Reason(StrEnum):
    """Why a message is in the quarantine: a closed vocabulary."""

    MISSING = "missing"  # the message has no value (a Kafka tombstone)
    EMPTY = "empty"
    TOO_LARGE = "too_large"  # more bytes than allowed
    NOT_AN_IMAGE = "not_an_image"
    FORMAT_NOT_ALLOWED = "format_not_allowed"  # an image, in a format that is not taken
    DECOMPRESSION_BOMB = "decompression_bomb"  # more pixels, scans or text than allowed once unpacked
    TRUNCATED = "truncated"
    CORRUPT = "corrupt"
    UNSUPPORTED_MODE = "unsupported_mode"  # pixels without a defined meaning as 8-bit RGB
    NON_FINITE_FEATURES = "non_finite_features"


@dataclass(frozen=True, slots=True)
class BadImage:
    """A message that cannot be scored: where, why (for machines) and why (for people)."""

    stage: Stage
    reason: Reason
    detail: str


@dataclass(frozen=True, slots=True)
class Limits:
    """What is taken: size of the encoded image, number of its pixels, and its formats as Pillow names them."""

    max_bytes: int = 20 * 1024 * 1024
    max_pixels: int = 24_000_000
    formats: tuple[str, ...] = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")


DEFAULT_LIMITS = Limits()

# A progressive JPEG may repeat the whole picture in thousands of nearly empty scans; real ones have about ten.
_MAX_JPEG_SCANS = 100
_MAX_DETAIL = 200  # characters
_JPEG_START_OF_SCAN = b"\xff\xda"
_IDENTIFY_BYTES = 1 << 20  # some of Pillow's parsers read on to the end, a line at a time
_JPEG_END_WINDOW = 64  # cameras append a few bytes behind the end marker

_SIGNATURE = re.compile(
    rb"(?P<JPEG>\xff\xd8\xff)"
    rb"|(?P<PNG>\x89PNG\r\n\x1a\n)"
    rb"|(?P<GIF>GIF8[79]a)"
    rb"|(?P<WEBP>RIFF.{4}WEBP)"
    rb"|(?P<BMP>BM.{4}\0{4})"
    rb"|(?P<TIFF>II[*+]\0|MM\0[*+])"
    rb"|(?P<AVIF>.{4}ftypavi[fs])"
    rb"|(?P<HEIF>.{4}ftyp(?:hei[cfmsx]|hev[cmsx]|mif1|msf1))",
    re.DOTALL,
)

_ORIENTATION_TAG = 0x0112
_UPRIGHT: dict[int, Callable[[NDArray[np.uint8]], NDArray[np.uint8]]] = {  # EXIF orientation to what undoes it
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
# Up to this factor between neighbouring pixels of source and target, plain bilinear sampling passes over none of them,
# and takes an eighth of the time of Pillow's filter, which is as wide as the factor.
_NEAR = 1.5
_CONVERTIBLE = ("1", "P", "CMYK", "YCbCr", "HSV", "RGBX")


class _UnsupportedModeError(ValueError):
    """Pixels of a mode that has no defined conversion to 8-bit RGB."""


def decode(
    data: bytes | None, size: tuple[int, int] | None, limits: Limits = DEFAULT_LIMITS, resize: Resize = "stretch"
) -> NDArray[np.uint8] | BadImage:
    """Decode one image to uint8 RGB of shape (height, width, 3), values 0..255, with `size` = (height, width).

    `resize="stretch"` maps the whole picture to `size`; `"crop"` takes the largest centred window of `size`'s aspect;
    without a size the picture keeps its own. The first frame is taken of an animation. EXIF orientation is applied,
    transparency is laid over white, CMYK and palettes become RGB, 16-bit gray is scaled to 8 bits. Never raises,
    whatever the bytes are; the array is read-only.
    """
    if data is None:
        return BadImage(Stage.READ, Reason.MISSING, "the message has no value")
    if not data:
        return BadImage(Stage.READ, Reason.EMPTY, "the message has 0 bytes")
    if len(data) > limits.max_bytes:
        return BadImage(Stage.READ, Reason.TOO_LARGE, f"{len(data)} bytes, at most {limits.max_bytes} are taken")
    with warnings.catch_warnings():
        # What Pillow warns of (odd metadata, sizes between its two bomb limits) is either harmless or judged here.
        warnings.simplefilter("ignore")
        return _decode_known(data, size, limits, resize)


def read_limited(path: str | Path, limits: Limits = DEFAULT_LIMITS) -> bytes:
    """A file's content, or one byte more than an image may have: enough for `decode` to tell that it is too large.

    Raises OSError if it cannot be read.
    """
    with Path(path).open("rb") as file:
        return file.read(limits.max_bytes + 1)


def _decode_known(
    data: bytes, size: tuple[int, int] | None, limits: Limits, resize: Resize
) -> NDArray[np.uint8] | BadImage:
    image_format = _identify(data)
    if image_format is None:
        return BadImage(Stage.DECODE, Reason.NOT_AN_IMAGE, f"starts with {data[:8].hex(' ')}, no known image format")
    if image_format not in limits.formats:
        taken = ", ".join(limits.formats)
        return BadImage(Stage.DECODE, Reason.FORMAT_NOT_ALLOWED, f"{image_format}, taken are {taken}")
    stage = Stage.DECODE
    try:
        with Image.open(BytesIO(data), formats=(image_format,)) as image:
            if bomb := _find_bomb(data, image, limits):
                return BadImage(Stage.DECODE, Reason.DECOMPRESSION_BOMB, bomb)
            # A JPEG is decoded at 1/2, 1/4 or 1/8 where that still covers the target, whichever way round it lies.
            if size is not None:
                image.draft("RGB", (max(size), max(size)))
            image.load()
            stage = Stage.PREPROCESS
            return _shape_pixels(image, size, resize)
    except Exception as error:  # noqa: BLE001 decoders raise what they please on hostile bytes
        return _explain(error, stage, data, image_format)


def _identify(data: bytes) -> str | None:
    """The format of `data` as Pillow names it, or None if it is no image."""
    if found := _SIGNATURE.match(data):
        return found.lastgroup
    try:
        with Image.open(BytesIO(data[:_IDENTIFY_BYTES])) as image:
            return image.format
    except Image.DecompressionBombError:
        return "an image of unknown format"
    except Exception:  # noqa: BLE001 a format's parser tripping over bytes that are not its own
        return None


def _find_bomb(data: bytes, image: Image.Image, limits: Limits) -> str | None:
    pixels = image.width * image.height
    if pixels > limits.max_pixels:
        return f"{image.width}x{image.height} = {pixels} pixels, at most {limits.max_pixels} are taken"
    if data.startswith(b"\xff\xd8") and (scans := data.count(_JPEG_START_OF_SCAN)) > _MAX_JPEG_SCANS:
        return f"a JPEG of {scans} scans, at most {_MAX_JPEG_SCANS} are taken"
    return None


def _explain(error: Exception, stage: Stage, data: bytes, image_format: str) -> BadImage:
    # Pillow's own text for a header it cannot read names an object in memory, different every time.
    said = "its header cannot be read" if isinstance(error, UnidentifiedImageError) else str(error)
    detail = f"{image_format}: {said or type(error).__name__}"[:_MAX_DETAIL]
    message = said.lower().replace("_", " ")
    if isinstance(error, _UnsupportedModeError):
        reason = Reason.UNSUPPORTED_MODE
    elif isinstance(error, Image.DecompressionBombError) or "text chunk" in message:
        reason = Reason.DECOMPRESSION_BOMB
    elif "truncated" in message or _is_cut_off(data, image_format):
        reason = Reason.TRUNCATED
    else:
        reason = Reason.CORRUPT
    return BadImage(stage, reason, detail)


def _is_cut_off(data: bytes, image_format: str) -> bool:
    """Whether bytes that do not decode also lack the end that their format promises."""
    match image_format:
        case "JPEG":
            whole = b"\xff\xd9" in data[-_JPEG_END_WINDOW:]
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
        case _:
            whole = True
    return not whole


def _shape_pixels(image: Image.Image, size: tuple[int, int] | None, resize: Resize) -> NDArray[np.uint8]:
    """Convert to 8 bits, resize and turn upright, in this order: the later steps then touch few pixels."""
    height, width = size or (image.height, image.width)
    orientation = _read_orientation(image)
    if size is not None and orientation in _SIDEWAYS:
        height, width = width, height
    image = _to_eight_bits(image)
    if resize == "crop":  # not by the box of resize(), whose filter also looks at pixels outside of the box
        image = image.crop(_centred_box(image.width, image.height, width, height))
    if max(image.width / width, image.height / height) > _NEAR:
        image = image.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=2.0)
    pixels = np.asarray(image)
    if pixels.shape[:2] != (height, width):
        pixels = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_LINEAR)
    if orientation in _UPRIGHT:
        pixels = _UPRIGHT[orientation](pixels)
    if pixels.ndim == _GRAY:
        pixels = np.repeat(pixels[..., np.newaxis], 3, axis=2)
    pixels.flags.writeable = False
    return pixels


def _read_orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; unreadable metadata does not make a good picture bad.

    Pillow turns a TIFF upright by itself while loading, and drops the tag.
    """
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # noqa: BLE001 metadata parsers raise what they please
        return 1


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """An image of mode L or RGB, of the same size."""
    if image.mode in ("L", "RGB") and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16"):
        return Image.fromarray(_scale_to_eight_bits(np.asarray(image)))
    if image.has_transparency_data:
        layers = image.convert("RGBA")
        white = Image.new("RGBA", layers.size, "white")
        return Image.alpha_composite(white, layers).convert("RGB")
    if image.mode in _CONVERTIBLE:
        return image.convert("L" if image.mode == "1" else "RGB")
    raise _UnsupportedModeError(f"pixels of mode {image.mode} have no defined range to scale to 8 bits")


def _scale_to_eight_bits(pixels: NDArray[np.uint16]) -> NDArray[np.uint8]:
    """0..65535 to 0..255, rounded: 65535 = 255 * 257."""
    return ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _centred_box(image_width: int, image_height: int, width: int, height: int) -> tuple[int, int, int, int]:
    """The largest centred window of the aspect width:height, as (left, top, right, bottom) in whole pixels."""
    scale = min(image_width / width, image_height / height)
    box_width, box_height = max(1, round(width * scale)), max(1, round(height * scale))
    left, top = (image_width - box_width) // 2, (image_height - box_height) // 2
    return left, top, left + box_width, top + box_height
