"""Inspecting encoded images before decoding: their format and a bound on the cost of decoding.

Plain Python with a bounded number of steps. Pixels are only one dimension of what a small file can cost; tiles, strips,
chunks, segments, scans and directories are counted as well.
"""

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from models.tiff_header import tiff_excess

# Real files have a few dozen segments, plus up to 255 of a colour profile and about 100 of an extended XMP packet.
MAX_JPEG_SEGMENTS = 1_000
# A progressive JPEG may repeat the image in thousands of nearly empty scans; real ones have about ten.
MAX_JPEG_SCANS = 100
MAX_PNG_CHUNKS = 20_000  # some encoders write one per row
MAX_GIF_BLOCKS = 10_000  # of extensions before the first frame
MAX_WEBP_CHUNKS = 10_000
MAX_LEAD_BYTES = 1024  # before the image: a line of text, a byte order mark, blank lines
MAX_PIXELS_PER_RLE_BYTE = 256  # twice the maximum of run-length encoding

# Limits of images that are decoded in this process.
_CHEAP_PIXELS = 16_000_000  # of a baseline JPEG, after scaling during decoding
_PILLOW_PIXELS = 178_000_000  # Pillow's default limit
_CHEAP_PNG_PIXELS = 4_000_000
_CHEAP_PNG_CHUNKS = 500
_CHEAP_METADATA = 64 * 1024  # bytes

_SIGNATURE = re.compile(
    rb"(?P<JPEG>\xff\xd8\xff)"
    rb"|(?P<PNG>\x89PNG\r\n\x1a\n)"
    rb"|(?P<GIF>GIF8[79]a)"
    rb"|(?P<WEBP>RIFF.{4}WEBP)"
    rb"|(?P<BMP>BM.{4}\0{4})"
    rb"|(?P<TIFF>II[*+]\0|MM\0[*+])"
    rb"|(?P<AVIF>.{4}ftypavi[fs])"
    rb"|(?P<HEIF>.{4}ftyp(?:hei[cfmsx]|hev[cmsx]|mif1|msf1))"
    rb"|(?P<JXL>\xff\x0a|\0{3}\x0cJXL \r\n\x87\n)"
    rb"|(?P<JPEG2000>\xff\x4f\xff\x51|\0{3}\x0cjP  \r\n\x87\n)"
    rb"|(?P<SVG>(?:\xef\xbb\xbf)?\s{0,64}(?:<\?xml[^>]{0,256}>\s{0,64})?(?:<!--[^>]{0,1024}>\s{0,64})?"
    rb"(?:<!DOCTYPE\s{1,8}svg[^>]{0,512}>\s{0,64})?<svg[\s>])"
    rb"|(?P<PDF>%PDF-)"
    rb"|(?P<EPS>%!PS|\xc5\xd0\xd3\xc6)"
    rb"|(?P<ICO>\0\0\x01\0[^\0]\0)"
    rb"|(?P<PSD>8BPS\0[\x01\x02])"
    rb"|(?P<ICNS>icns\0)"
    rb"|(?P<PPM>P[1-7f]\s)"
    rb"|(?P<DDS>DDS )"
    rb"|(?P<SGI>\x01\xda[\0\x01][\x01\x02])"
    rb"|(?P<PCX>\x0a[\0\x02\x03\x05]\x01[\x01\x02\x04\x08])"
    rb"|(?P<QOI>qoif)"
    rb"|(?P<EXR>v/1\x01)",
    re.DOTALL,
)
_TGA_END = b"TRUEVISION-XFILE.\0"
_NAMES = {"JXL": "JPEG XL", "HEIF": "HEIC"}
_LATER = re.compile(rb"(?P<JPEG>\xff\xd8\xff[\xc0-\xfe])|(?P<PNG>\x89PNG\r\n\x1a\n)")
# Files of other kinds that may contain images: archives, documents, programs, audio.
_CONTAINER = re.compile(
    rb"PK|BLP|.{257}ustar|%PDF|Rar!|7z|\x1f\x8b|BZh|\xfd7z|ID3|RIFF|OggS|fLaC|MZ|\x7fELF|.{4}ftyp|\s{0,64}<"
    rb"|\0|--[^\n]{1,200}\n[Cc]ontent-",  # a record of a schema registry, a multipart body
    re.DOTALL,
)

_JPEG_FILL = re.compile(rb"\xff+")
_SOI, _EOI = b"\xff\xd8", b"\xff\xd9"
_SOS, _APP1, _APP2 = 0xDA, 0xE1, 0xE2
_JPEG_COLOURS = {(0xE0, b"JFIF\0"), (0xEE, b"Adobe")}  # segments that define the colour space
_JPEG_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_JPEG_BASELINE = (0xC0, 0xC1)  # sequential, Huffman
_JPEG_ALONE = {0x01, *range(0xD0, 0xD8)}  # markers without a length
_JPEG_TABLES = {*range(0xC0, 0xD0), 0xDB, 0xDC, 0xDD}
_ORIENTATION_TAG = 0x0112
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([1-8])')
_INTEGERS = {1: "B", 3: "H", 4: "I"}  # types of a TIFF's entry


class Sniffed(NamedTuple):
    """The format by its name in Pillow, and the offset of the image's first byte."""

    format: str
    start: int


@dataclass(frozen=True, slots=True)
class Header:
    """The result of inspecting an image.

    Attributes:
        data: the bytes to decode, without any before the image and, for JPEG, without metadata.
        excess: the limit that the image exceeds, if any.
        cheap: whether its cost is bounded, so that it may be decoded in this process.
        orientation: the EXIF orientation, 1 to 8; None if the decoder has to read it.
        damage: damage outside the pixels, if any.
        cut: whether the end marker of the format is missing.
    """

    data: bytes
    excess: str | None = None
    cheap: bool = False
    orientation: int | None = None
    damage: str | None = None
    cut: bool = False


def sniff(data: bytes) -> Sniffed | None:
    """Detect the format of an encoded image by its signature; None if it is unknown."""
    if found := _SIGNATURE.match(data):
        image_format = str(found.lastgroup)
        if image_format == "HEIF" and b"avif" in data[16 : min(256, int.from_bytes(data[:4]))]:
            image_format = "AVIF"
        return Sniffed(image_format, 0)
    if data.endswith(_TGA_END):
        return Sniffed("TGA", 0)
    lead = data[: MAX_LEAD_BYTES + 8]
    if (later := _LATER.search(lead)) and not _CONTAINER.match(lead):
        return Sniffed(str(later.lastgroup), later.start())
    return None


def name_of(image_format: str) -> str:
    """A format's usual name."""
    return _NAMES.get(image_format, image_format)


def read_header(data: bytes, found: Sniffed, size: tuple[int, int], max_pixels: int) -> Header:
    """Inspect the header of an image.

    Args:
        size: (height, width) that it will be decoded to.
        max_pixels: the limit of width times height.
    """
    lead = f"{found.start} bytes before the image" if found.start else None
    data = data[found.start :]
    try:
        if found.format == "JPEG":
            return _jpeg(data, lead, size, max_pixels)
        if found.format == "PNG":
            return _png(data, lead, max_pixels)
        return Header(data, _EXCESS[found.format](data, max_pixels) if found.format in _EXCESS else None)
    except Exception:  # noqa: BLE001  truncated or with invalid offsets: the decoder reports it
        return Header(data, damage=lead)


def too_many_pixels(width: int, height: int, max_pixels: int) -> str | None:
    """A message if an image of this size exceeds the limit, else None."""
    if width * height > max_pixels:
        return f"{width}x{height} = {width * height} pixels, the limit is {max_pixels}"
    return None


# ---- JPEG, ISO/IEC 10918-1, annex B


def _jpeg(data: bytes, lead: str | None, size: tuple[int, int], max_pixels: int) -> Header:
    """Keep tables, frame and scans only: parsing metadata has additional costs."""
    kept, orientation, multiple = [_SOI], None, False
    pixels = components = frame = scans_at = 0
    for count, (marker, start, end) in enumerate(_jpeg_segments(data)):
        if count > MAX_JPEG_SEGMENTS:
            return Header(data, f"more than {MAX_JPEG_SEGMENTS} segments before its first scan")
        if marker == _SOS:
            scans_at = start - 2
            break
        if marker in _JPEG_FRAMES and not frame:
            precision, height, width, components = struct.unpack_from(">BHHB", data, start + 2)
            if excess := too_many_pixels(width, height, max_pixels):
                return Header(data, excess)
            frame = marker if precision == 8 and width * height <= _PILLOW_PIXELS else 0xFF  # noqa: PLR2004
            pixels = width * height // _jpeg_scale(width, height, size) ** 2
        if marker in _JPEG_TABLES or (marker, data[start + 2 : start + 7]) in _JPEG_COLOURS:
            kept.append(b"\xff" + bytes([marker]) + data[start:end])
        elif marker == _APP2 and data.startswith(b"MPF\0", start + 2):
            multiple = True
        elif marker == _APP1 and orientation is None:
            orientation = _app1_orientation(data[start + 2 : end])
    single = frame in _JPEG_BASELINE and data[scans_at + 4] == components
    scans = _jpeg_scans(data, scans_at, single=single, multiple=multiple)
    if scans.n > MAX_JPEG_SCANS:
        return Header(data, f"{scans.n} scans, the limit is {MAX_JPEG_SCANS}")
    tables = b"".join(kept)
    return Header(
        data if len(tables) == scans_at and scans.end == len(data) else tables + data[scans_at : scans.end],
        cheap=single and scans.n == 1 and not scans.cut and pixels <= _CHEAP_PIXELS,
        orientation=orientation or 1,
        damage=lead or scans.damage,
        cut=scans.cut,
    )


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """(marker, offset of its length, end) of each segment up to that of the first scan.

    Raises IndexError if there is no segment; the decoder decides whether that is an error.
    """
    at = 2
    while True:
        fill = _JPEG_FILL.match(data, at)
        if fill is None:
            raise IndexError("no marker")
        marker, at = data[fill.end()], fill.end() + 1
        if marker in _JPEG_ALONE:
            continue
        (length,) = struct.unpack_from(">H", data, at)
        if length < 2 or at + length > len(data):  # noqa: PLR2004  the length includes itself
            raise IndexError("truncated segment")
        yield marker, at, at + length
        at += length


class _Scans(NamedTuple):
    n: int
    end: int
    cut: bool
    damage: str | None


def _jpeg_scans(data: bytes, start: int, *, single: bool, multiple: bool) -> _Scans:
    """The scans that begin at `start`.

    Args:
        start: the offset of the first scan.
        single: whether one scan has all components, with no other marker before the end.
        multiple: whether the file contains further images (CIPA DC-007, Multi-Picture Format).
    """
    # Tables between scans may contain the bytes of a marker, and so may further images.
    found = data.find(_EOI, start) if single else data.rfind(_EOI, start)
    end = found + 2 if found >= 0 else len(data)
    damage = None
    if found < 0:
        damage = "its end marker is missing"
    elif end < len(data) and not multiple and not data.startswith(b"\xff\xd8\xff", end):
        damage = f"{len(data) - end} bytes after the image"
    return _Scans(data.count(b"\xff\xda", start, end), end, found < 0, damage)


def _jpeg_scale(width: int, height: int, size: tuple[int, int]) -> int:
    """The factor by which Pillow scales a JPEG down during decoding to cover a square of the longer side of `size`."""
    factor = min(width, height) // max(size)
    return next((scale for scale in (8, 4, 2) if factor >= scale), 1)


def _app1_orientation(segment: bytes) -> int | None:
    if segment.startswith(b"Exif\0\0"):
        return exif_orientation(segment[6:])
    if segment.startswith(b"http://ns.adobe.com/xap/1.0/\0") and (found := _XMP_ORIENTATION.search(segment)):
        return int(found[1])
    return None


def exif_orientation(exif: bytes) -> int | None:
    """The orientation, 1 to 8, in EXIF data (a TIFF); None if it is missing or unreadable."""
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is None:
        return None
    try:
        (directory,) = struct.unpack_from(f"{order}I", exif, 4)
        (count,) = struct.unpack_from(f"{order}H", exif, directory)
        for entry in range(directory + 2, directory + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(f"{order}HH", exif, entry)
            if tag == _ORIENTATION_TAG and kind in _INTEGERS:
                (value,) = struct.unpack_from(order + _INTEGERS[kind], exif, entry + 8)
                return value if 1 <= value <= 8 else None  # noqa: PLR2004
    except struct.error:
        pass
    return None


# ---- PNG, W3C, Portable Network Graphics (third edition), section 5


def _png(data: bytes, lead: str | None, max_pixels: int) -> Header:
    at, chunks, metadata, animated, pixels, end = 8, 0, 0, False, 0, 0
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        chunks += 1
        if chunks > MAX_PNG_CHUNKS:
            return Header(data, f"more than {MAX_PNG_CHUNKS} chunks")
        if kind == b"IHDR":
            width, height = struct.unpack_from(">II", data, at + 8)
            if excess := too_many_pixels(width, height, max_pixels):
                return Header(data, excess)
            pixels = width * height
        elif kind == b"IEND":
            end = at + 12
            break
        elif kind not in {b"IDAT", b"PLTE", b"tRNS"}:
            metadata += length
            animated = animated or kind == b"acTL"
        at += 12 + length
    cut = not 0 < end <= len(data)
    damage = lead
    if cut:
        damage = damage or "its end marker is missing"
    elif end < len(data):
        damage = damage or f"{len(data) - end} bytes after the image"
    small = pixels <= _CHEAP_PNG_PIXELS and chunks <= _CHEAP_PNG_CHUNKS and metadata <= _CHEAP_METADATA
    return Header(data, cheap=small and not (animated or cut), damage=damage, cut=cut)


# ---- other formats


def _gif_excess(data: bytes, max_pixels: int) -> str | None:
    """CompuServe, Graphics Interchange Format, version 89a, appendix B."""
    screen_width, screen_height, flags = struct.unpack_from("<HHB", data, 6)
    at = 13 + (3 << ((flags & 7) + 1) if flags & 0x80 else 0)
    blocks = 0
    while data[at] == 0x21:  # noqa: PLR2004  an extension
        at += 2
        length = 1
        while length:  # an empty block is the last one of an extension
            length = data[at]
            at += 1 + length
            blocks += 1
            if blocks > MAX_GIF_BLOCKS:
                return f"more than {MAX_GIF_BLOCKS} blocks before its first frame"
    width, height = screen_width, screen_height
    if data[at] == 0x2C:  # noqa: PLR2004  a frame
        left, top, frame_width, frame_height = struct.unpack_from("<4H", data, at + 1)
        width, height = max(width, left + frame_width), max(height, top + frame_height)
    return too_many_pixels(width, height, max_pixels)


def _webp_excess(data: bytes, max_pixels: int) -> str | None:
    """RFC 9649, sections 2.5, 2.7 and 3.4, and RFC 6386, section 9.1."""
    at, chunks = 12, 0
    while at + 8 <= len(data):
        kind, length = struct.unpack_from("<4sI", data, at)
        width = height = 0
        if kind == b"VP8X":
            width, height = (1 + int.from_bytes(data[at + n : at + n + 3], "little") for n in (12, 15))
        elif kind == b"VP8L":
            (bits,) = struct.unpack_from("<I", data, at + 9)
            width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
        elif kind == b"VP8 ":
            width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", data, at + 14))
        if excess := too_many_pixels(width, height, max_pixels):
            return excess
        chunks += 1
        if chunks > MAX_WEBP_CHUNKS:
            return f"more than {MAX_WEBP_CHUNKS} chunks"
        at += 8 + length + length % 2
    return None


def _bmp_excess(data: bytes, max_pixels: int) -> str | None:
    (header_size,) = struct.unpack_from("<I", data, 14)
    if header_size == 12:  # noqa: PLR2004  OS/2's
        width, height = struct.unpack_from("<HH", data, 18)
        return too_many_pixels(width, height, max_pixels)
    width, height, _, _, compression = struct.unpack_from("<iiHHI", data, 18)
    pixels = abs(width) * abs(height)
    if compression in (1, 2) and pixels > MAX_PIXELS_PER_RLE_BYTE * len(data):
        return f"{pixels} pixels of run lengths in {len(data)} bytes"
    return too_many_pixels(abs(width), abs(height), max_pixels)


_EXCESS = {"GIF": _gif_excess, "WEBP": _webp_excess, "BMP": _bmp_excess, "TIFF": tiff_excess}
