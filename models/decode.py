"""Decoding of untrusted images to pixels.

A bad image is a value, not an exception: it goes to the quarantine with its bytes while the stream continues. The
format is detected by its signature, and only that format's decoder sees the bytes, after the header (pixels, tiles,
scans, chunks, …) was checked. Images whose cost is bounded by their header are decoded in this process, all others in a
guarded process with limits on time and memory (docs/decisions/0024).
"""

import warnings
from dataclasses import asdict
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from models.bad_image import DEFAULT_LIMITS, BadImage, Limits, Reason, Stage
from models.guarded import run_guarded
from models.image_header import Header, Sniffed, name_of, read_header, sniff
from models.pixels import Picture, Pixels, Resize, TruncatedError, Whole, decode_pixels

__all__ = [
    "DEFAULT_LIMITS", "BadImage", "Limits", "Picture", "Pixels", "Reason", "Resize", "Stage", "decode",
    "decode_full_size", "decode_marked", "read_limited",
]  # fmt: skip

_NO_LIMIT = (1 << 16, 1 << 16)  # larger than any image, so that no JPEG is decoded at reduced size


def decode(
    data: bytes | None, size: tuple[int, int], limits: Limits = DEFAULT_LIMITS, resize: Resize = "stretch"
) -> Pixels | BadImage:
    """Decode one image to RGB pixels.

    Of an animation, the first frame is decoded. EXIF orientation is applied, transparency is composited over white,
    CMYK and palettes are converted to RGB, and 16-bit gray is scaled to 8 bits. Never raises for the content of `data`.

    Args:
        data: the encoded image; None for a message without value.
        size: (height, width) of the result.
        resize: `stretch` maps the whole image to `size`; `crop` takes the largest centred window of `size`'s aspect.

    Returns:
        Read-only uint8 of shape (height, width, 3), values 0..255; or the reason why the image cannot be scored.
    """
    found = decode_marked(data, size, limits, resize)
    return found if isinstance(found, BadImage) else found.pixels


def decode_marked(
    data: bytes | None, size: tuple[int, int], limits: Limits = DEFAULT_LIMITS, resize: Resize | Whole = "stretch"
) -> Picture | BadImage:
    """As `decode`, with a description of the damage if a damaged image was decoded."""
    found = _known(data, limits)
    if data is None or isinstance(found, BadImage):
        return found  # type: ignore[return-value]  # of no data it is a BadImage
    header = read_header(data, found, size, limits.max_pixels)
    if bad := _refused(header, found.format, limits):
        return bad
    if header.cheap:
        with warnings.catch_warnings():
            # Pillow's warnings (odd metadata, sizes between its two bomb limits) are harmless or checked here.
            warnings.simplefilter("ignore")
            try:
                return decode_pixels(header, found.format, size, limits, resize, repair=False)
            except TruncatedError:
                pass
            except MemoryError:
                return BadImage(Stage.DECODE, Reason.DECODE_MEMORY, "this process lacks the memory to decode it")
    return _decode_guarded(header, found.format, size, limits, resize)


def decode_full_size(data: bytes | None, limits: Limits = DEFAULT_LIMITS) -> Picture | BadImage:
    """As `decode_marked`, at the image's own size."""
    return decode_marked(data, _NO_LIMIT, limits, "whole")


def _known(data: bytes | None, limits: Limits) -> Sniffed | BadImage:
    """The format of the image, if it is accepted."""
    if data is None:
        return BadImage(Stage.READ, Reason.MISSING, "the message has no value")
    if not data:
        return BadImage(Stage.READ, Reason.EMPTY, "the message has 0 bytes")
    if len(data) > limits.max_bytes:
        return BadImage(Stage.READ, Reason.TOO_LARGE, f"{len(data)} bytes, the limit is {limits.max_bytes}")
    found = sniff(data)
    if found is None:
        return BadImage(Stage.DECODE, Reason.NOT_AN_IMAGE, f"starts with {data[:8].hex(' ')}, no known image format")
    taken = [name for name in limits.formats if name != "HEIF" or _reads_heif()]
    if found.format not in taken:
        detail = f"{name_of(found.format)}, accepted are {', '.join(map(name_of, taken))}"
        hint = "; install imagestream[heif] to decode it" if found.format in limits.formats else ""
        return BadImage(Stage.DECODE, Reason.FORMAT_NOT_ALLOWED, detail + hint)
    return found


def _refused(header: Header, image_format: str, limits: Limits) -> BadImage | None:
    """The reason to reject an image by its header alone, if any."""
    if header.excess:
        return BadImage(Stage.DECODE, Reason.DECOMPRESSION_BOMB, f"{name_of(image_format)}: {header.excess}")
    if limits.strict and header.damage:
        reason = Reason.TRUNCATED if header.cut else Reason.CORRUPT
        return BadImage(Stage.DECODE, reason, f"{name_of(image_format)}: {header.damage}")
    return None


def read_limited(path: str | Path, limits: Limits = DEFAULT_LIMITS) -> bytes:
    """Read a file, or one byte more than the limit: enough for `decode` to reject it as too large.

    Raises:
        OSError: the file cannot be read.
    """
    with Path(path).open("rb") as file:
        return file.read(limits.max_bytes + 1)


def _decode_guarded(
    header: Header, image_format: str, size: tuple[int, int], limits: Limits, resize: Resize | Whole
) -> Picture | BadImage:
    request = {
        "operation": "decode",
        "format": image_format,
        "header": {"orientation": header.orientation, "damage": header.damage, "cut": header.cut},
        "limits": asdict(limits),
        "size": size,
        "resize": resize,
    }
    answer = run_guarded(request, header.data, limits)
    if isinstance(answer, BadImage):
        return answer
    said, result = answer
    if bad := said.get("bad"):
        return BadImage(Stage(bad["stage"]), Reason(bad["reason"]), bad["detail"])
    return Picture(np.frombuffer(result, np.uint8).reshape(said["shape"]), said["damage"])


@cache
def _reads_heif() -> bool:
    return find_spec("pillow_heif") is not None
