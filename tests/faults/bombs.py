"""Image bombs: small files that are expensive to decode, by their pixels, tiles, strips, chunks, scans, segments,
frames, palettes, compression ratio, metadata or nesting.

Each has the permitted outcomes: reasons for the quarantine, or `None` for decoding within the limits. The files are
assembled byte by byte because no encoder writes them.
"""

import gzip
import io
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from PIL import Image

from models.bad_image import Reason

BOMB, TIMEOUT, MEMORY = Reason.DECOMPRESSION_BOMB, Reason.DECODE_TIMEOUT, Reason.DECODE_MEMORY
CORRUPT, TRUNCATED = Reason.CORRUPT, Reason.TRUNCATED
OTHER_FORMAT, NO_IMAGE = Reason.FORMAT_NOT_ALLOWED, Reason.NOT_AN_IMAGE
FINE = None
MIB = 1024**2
HEAVY = {
    "tiff of one giant tile",
    "tiff of a tile of 2**62 pixels",
    "tiff of 250,000 tiles",
    "tiff of 1,000,000 strips",
    "tiff of 500,000 strips of which 64 are needed",
    "png of 1,500,000 empty chunks",
    "png of 500,000 texts",
    "webp of 2,000,000 chunks",
    "gif of 1,000,000 comments",
    "gif with a comment of 8 MB",
    "gif with a comment in 4,000,000 bytes",
    "jpeg of 30,000 scans",
    "jpeg of 8 MB of exif segments",
    "jpeg of 300,000 colour profiles",
    "jpeg of 1,000,000 comments",
    "jpeg of 200,000 tables",
    "tiff with 900 entries of 8 MB each",
    "webp of 100,000 frames",
    "portable pixmap with 10 MB of comments",
    "pixmap of C code",
    "10 MB of blank lines",
}


@dataclass(frozen=True)
class Bomb:
    """A hostile file and its permitted outcomes."""

    name: str
    outcomes: tuple[Reason | None, ...]
    make: Callable[[], bytes]

    @property
    def heavy(self) -> bool:
        """Whether the file is megabytes large."""
        return self.name in HEAVY


# ---- building blocks


@cache
def zeros(count: int) -> bytes:
    """`count` zero bytes compressed by zlib, as repetitions of one block."""
    blocks, rest = divmod(count, MIB)
    block = zlib.compressobj(9, zlib.DEFLATED, -15)
    compressed = (block.compress(bytes(MIB)) + block.flush(zlib.Z_FULL_FLUSH)) * blocks
    last = zlib.compressobj(9, zlib.DEFLATED, -15)
    checksum = struct.pack(">HH", count % 65_521, 1)
    return b"\x78\xda" + compressed + last.compress(bytes(rest)) + last.flush() + checksum


def encode(image: Image.Image, image_format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def small(image_format: str, **options: Any) -> bytes:
    return encode(Image.linear_gradient("L").resize((64, 64)).convert("RGB"), image_format, **options)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, idat: bytes, *, depth: int = 8, color: int = 2, interlace: int = 0,
        before: bytes = b"", after: bytes = b"") -> bytes:  # fmt: skip
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, interlace)
    parts = [chunk(b"IHDR", header), before, chunk(b"IDAT", idat), after, chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff(entries: Sequence[tuple[int, int, int, Any]], blobs: Sequence[bytes]) -> bytes:
    """A little-endian TIFF with one directory; the value of an entry is a number or ("blob", index)."""
    body, offsets = b"", []
    for blob in blobs:
        offsets.append(8 + len(body))
        body += blob + b"\0" * (len(blob) % 2)
    fields = b"".join(
        struct.pack("<HHII", tag, kind, count, offsets[value[1]] if isinstance(value, tuple) else value)
        for tag, kind, count, value in sorted(entries, key=lambda entry: entry[0])
    )
    return b"II*\0" + struct.pack("<I", 8 + len(body)) + body + struct.pack("<H", len(entries)) + fields + bytes(4)


def tiled(width: int, height: int, tile_width: int, tile_height: int, tiles: int) -> bytes:
    """A deflated RGB TIFF whose tiles all refer to the same bytes."""
    pixels, bits = zeros(min(tile_width * tile_height * 3, 2**31)), struct.pack("<3H", 8, 8, 8)
    start = 8 + len(bits)
    offsets, lengths = struct.pack(f"<{tiles}I", *[start] * tiles), struct.pack(f"<{tiles}I", *[len(pixels)] * tiles)

    def place(blob: bytes, index: int) -> Any:
        return ("blob", index) if tiles > 1 else struct.unpack("<I", blob)[0]

    return tiff(
        [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 3, ("blob", 0)), (259, 3, 1, 8), (262, 3, 1, 2),
         (277, 3, 1, 3), (322, 4, 1, tile_width), (323, 4, 1, tile_height), (324, 4, tiles, place(offsets, 2)),
         (325, 4, tiles, place(lengths, 3))],
        [bits, pixels, offsets, lengths],
    )  # fmt: skip


def stripped(width: int, height: int, rows: int, strips: int, data: bytes, compression: int) -> bytes:
    """A grayscale TIFF whose strips all refer to the same bytes."""
    offsets, lengths = struct.pack(f"<{strips}I", *[8] * strips), struct.pack(f"<{strips}I", *[len(data)] * strips)
    return tiff(
        [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 1 if compression == 4 else 8), (259, 3, 1, compression),
         (262, 3, 1, 1), (277, 3, 1, 1), (278, 4, 1, rows),
         (273, 4, strips, ("blob", 1) if strips > 1 else 8),
         (279, 4, strips, ("blob", 2) if strips > 1 else len(data))],
        [data, offsets, lengths],
    )  # fmt: skip


def segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


def jpeg_after(segments: bytes) -> bytes:
    """A valid JPEG that begins with these segments."""
    return b"\xff\xd8" + segments + small("JPEG")[2:]


def resized_jpeg(width: int, height: int, marker: int, **options: Any) -> bytes:
    """A JPEG of 64×64 pixels whose header declares another size and the type of `marker`."""
    data = bytearray(small("JPEG", **options))
    frame = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"))
    data[frame + 1] = marker
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def many_scans(width: int, height: int, scans: int) -> bytes:
    """A progressive JPEG whose last scan is repeated."""
    data = resized_jpeg(width, height, 0xC2, progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * (scans - data.count(b"\xff\xda")) + b"\xff\xd9"


def exif_directory(entries: int, size: int) -> bytes:
    """An EXIF segment whose entries all refer to the same bytes."""
    body = b"II*\0\x08\0\0\0" + struct.pack("<H", entries)
    body += b"".join(struct.pack("<HHII", 0x9000 + n, 7, size, 8) for n in range(entries)) + bytes(4)
    return segment(0xE1, b"Exif\0\0" + body)


def bmp(width: int, height: int, bits: int, compression: int, body: bytes, *, colours: int = 256) -> bytes:
    start = 54 + 4 * min(colours, 256)
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, len(body), 0, 0, colours, 0)
    return b"BM" + struct.pack("<IHHI", start + len(body), 0, 0, start) + header + bytes(start - 54) + body


def gif(width: int, height: int, extensions: bytes = b"", frames: int = 1) -> bytes:
    frame = b"," + struct.pack("<4HB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\x00"
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6) + extensions + frame * frames + b";"


def webp(chunks: bytes) -> bytes:
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WEBP" + chunks


def vp8x(width: int, height: int, flags: int = 0) -> bytes:
    sides = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return b"VP8X" + struct.pack("<II", 10, flags) + sides


def icon(side: int) -> bytes:
    data = png(side, side, zeros((side * 4 + 1) * side), color=6)
    return struct.pack("<HHH", 0, 1, 1) + struct.pack("<BBBBHHII", 0, 0, 0, 0, 1, 32, len(data), 22) + data


def box(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body) + 8) + kind + body


def avif_declaring(width: int, height: int) -> bytes:
    data = bytearray(small("AVIF"))
    at = data.index(b"ispe") + 8
    data[at : at + 8] = struct.pack(">II", width, height)
    return bytes(data)


def circular_tiff(depth: int) -> bytes:
    """Directories that are linked in a circle."""
    data = small("TIFF")
    (first,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, first)
    link = first + 2 + 12 * count
    directory = data[first:link]
    step = len(directory) + 4
    head = data[:link] + struct.pack("<I", len(data))
    tail = b"".join(directory + struct.pack("<I", len(data) + (n + 1) * step) for n in range(depth))
    return head + data[link + 4 :] + tail[:-4] + struct.pack("<I", first)


def nested_ifds(depth: int) -> bytes:
    """EXIF directories nested in each other."""
    data = b""
    for n in range(depth):
        data += struct.pack("<HHHIII", 1, 0x8769, 4, 1, 8 + (n + 1) * 18, 0)
    return jpeg_after(segment(0xE1, b"Exif\0\0II*\0\x08\0\0\0" + data[:60_000]))


def svg_of_laughs() -> bytes:
    entities = "".join(f'<!ENTITY l{n} "{f"&l{n - 1};" * 10}">' for n in range(1, 30))
    return f'<svg xmlns="http://www.w3.org/2000/svg"><!DOCTYPE l [{entities}]>&l29;</svg>'.encode()


def apng(frames: int) -> bytes:
    control = chunk(b"acTL", struct.pack(">II", frames, 0))
    frame = chunk(b"fcTL", struct.pack(">IIIIIHHBB", 0, 64, 64, 0, 0, 1, 1, 0, 0))
    return png(64, 64, zeros(64 * 193), before=control + frame * min(frames, 15_000))


BOMBS = (
    # pixels
    Bomb("png of 2,500 megapixels", (BOMB,), lambda: png(50_000, 50_000, b"")),
    Bomb("png of 2**62 pixels", (BOMB,), lambda: png(2**31 - 1, 2**31 - 1, b"")),
    Bomb("png of 65 megapixels, complete", (BOMB,), lambda: png(8_125, 8_000, zeros(8_000 * 24_376))),
    Bomb("png of 64 megapixels, complete", (FINE,), lambda: png(8_000, 8_000, zeros(8_000 * 24_001))),
    Bomb("jpeg of 4,290 megapixels", (BOMB,), lambda: resized_jpeg(65_500, 65_500, 0xC0)),
    Bomb("jpeg of 64 megapixels without data", (FINE, TRUNCATED), lambda: resized_jpeg(8_000, 8_000, 0xC0)),
    Bomb("bmp of 2**62 pixels", (BOMB,), lambda: bmp(2**31 - 1, -(2**31), 24, 0, b"")),
    Bomb("gif of a large screen", (BOMB,), lambda: gif(65_535, 65_535)),
    Bomb("webp of a large canvas", (BOMB,), lambda: webp(vp8x(16_383, 16_383, 2))),
    Bomb("webp of 2**48 pixels", (BOMB,), lambda: webp(vp8x(2**24, 2**24))),
    Bomb("tiff of 2**62 pixels", (BOMB,), lambda: stripped(2**31, 2**31, 1, 1, b"\0", 1)),
    Bomb("avif of 2**62 pixels", (BOMB, CORRUPT), lambda: avif_declaring(2**31, 2**31)),
    Bomb("avif of 250 megapixels", (BOMB, CORRUPT), lambda: avif_declaring(16_000, 16_000)),
    # tiles
    Bomb("tiff of 2,000 tiles larger than it", (BOMB,), lambda: tiled(32_000, 1, 16, 80_000, 2_000)),
    Bomb("tiff of 30,000 tiles larger than it", (BOMB,), lambda: tiled(32_000, 1, 16, 4_000, 30_000)),
    Bomb("tiff of one giant tile", (BOMB,), lambda: tiled(100, 100, 26_000, 26_000, 1)),
    Bomb("tiff of a tile of 2**62 pixels", (BOMB,), lambda: tiled(100, 100, 2**31, 2**31, 1)),
    Bomb("tiff of 250,000 tiles", (BOMB,), lambda: tiled(8_000, 8_000, 16, 16, 250_000)),
    Bomb("tiff of tiles of size zero", (BOMB, CORRUPT, TRUNCATED), lambda: tiled(100, 100, 0, 0, 4)),
    # strips
    Bomb("tiff of 1,000,000 strips", (BOMB,), lambda: stripped(1, 1_000_000, 1, 1_000_000, zeros(1), 8)),
    Bomb("tiff of 500,000 strips of which 64 are needed", (BOMB,), lambda: stripped(64, 64, 1, 500_000, zeros(64), 8)),
    Bomb("tiff of 1,000 strips of 64 megapixels", (FINE,), lambda: stripped(8_000, 8_000, 8, 1_000, zeros(64_000), 8)),
    # chunks
    Bomb("png of 1,500,000 empty chunks", (BOMB,), lambda: png(64, 64, b"", after=chunk(b"IDAT", b"") * 1_500_000)),
    Bomb(
        "png of 500,000 texts", (BOMB,), lambda: png(64, 64, zeros(64 * 193), before=chunk(b"tEXt", b"a\0b") * 500_000)
    ),
    Bomb("webp of 2,000,000 chunks", (BOMB,), lambda: webp(vp8x(64, 64) + b"JUNK\0\0\0\0" * 2_000_000)),
    Bomb("gif of 1,000,000 comments", (BOMB,), lambda: gif(64, 64, b"!\xfe\x01a\0" * 1_000_000)),
    Bomb(
        "gif with a comment of 8 MB", (BOMB,), lambda: gif(64, 64, b"!\xfe" + (b"\xff" + bytes(255)) * 32_768 + b"\0")
    ),
    Bomb(
        "gif with a comment in 4,000,000 bytes", (BOMB,), lambda: gif(64, 64, b"!\xfe" + b"\x01a" * 4_000_000 + b"\0")
    ),
    # scans
    Bomb("jpeg of 200 scans", (BOMB,), lambda: many_scans(64, 64, 200)),
    Bomb(
        "jpeg of 100 scans of 60 megapixels", (FINE, TRUNCATED, TIMEOUT, MEMORY), lambda: many_scans(7_744, 7_744, 100)
    ),
    Bomb("jpeg of 30,000 scans", (BOMB,), lambda: many_scans(64, 64, 30_000)),
    Bomb(
        "progressive jpeg of 60 megapixels",
        (FINE, TRUNCATED, TIMEOUT, MEMORY),
        lambda: resized_jpeg(7_744, 7_744, 0xC2, progressive=True),
    ),
    Bomb(
        "arithmetic jpeg of 60 megapixels",
        (FINE, TRUNCATED, CORRUPT, TIMEOUT),
        lambda: resized_jpeg(7_744, 7_744, 0xC9),
    ),
    Bomb(
        "progressive arithmetic jpeg of 60 megapixels",
        (FINE, TRUNCATED, CORRUPT, TIMEOUT, MEMORY),
        lambda: resized_jpeg(7_744, 7_744, 0xCA, progressive=True),
    ),
    # segments and metadata
    Bomb(
        "jpeg of 8 MB of exif segments",
        (BOMB,),
        lambda: jpeg_after(segment(0xE1, b"Exif\0\0II*\0\x08\0\0\0\0\0") * (8 * MIB // 20)),
    ),
    Bomb(
        "jpeg of 300,000 colour profiles",
        (BOMB,),
        lambda: jpeg_after(segment(0xE2, b"ICC_PROFILE\0\1\1abcd") * 300_000),
    ),
    Bomb("jpeg of 1,000,000 comments", (BOMB,), lambda: jpeg_after(segment(0xFE, b"") * 1_000_000)),
    Bomb("jpeg of 200,000 tables", (BOMB,), lambda: jpeg_after(segment(0xDB, bytes(65)) * 200_000)),
    Bomb(
        "jpeg after 15 MB of fill bytes",
        (FINE,),
        lambda: jpeg_after(b"\xff" * 15_000_000 + segment(0xFE, b"")[1:]),
    ),
    Bomb("jpeg with 5,000 entries of 60 KB", (FINE,), lambda: jpeg_after(exif_directory(5_000, 60_000))),
    Bomb(
        "jpeg with 300 segments of 64 KB of exif",
        (FINE,),
        lambda: jpeg_after(segment(0xE1, b"Exif\0\0" + bytes(65_000)) * 300),
    ),
    Bomb(
        "jpeg with 250 photoshop segments of 5,000 resources",
        (FINE,),
        lambda: jpeg_after(segment(0xED, b"Photoshop 3.0\0" + b"8BIM\x04\x04\0\0\0\0\0\0" * 5_000) * 250),
    ),
    Bomb(
        "jpeg that declares 2**32 - 1 pictures",
        (FINE,),
        lambda: jpeg_after(
            segment(0xE2, b"MPF\0II*\0\x08\0\0\0\x01\0\x01\xb0\x04\0\x01\0\0\0\xff\xff\xff\xff\0\0\0\0")
        ),
    ),
    Bomb("jpeg with 3,000 nested directories", (FINE,), lambda: nested_ifds(3_000)),
    Bomb(
        "png with 50 MB of text",
        (BOMB,),
        lambda: png(1, 1, zeros(4), before=chunk(b"zTXt", b"comment\0\0" + zeros(50_000_000))),
    ),
    Bomb(
        "png of 500 texts of 1 MB",
        (BOMB,),
        lambda: png(1, 1, zeros(4), before=chunk(b"zTXt", b"comment\0\0" + zeros(1_000_000)) * 500),
    ),
    Bomb(
        "png with a colour profile of 500 MB",
        (BOMB,),
        lambda: png(1, 1, zeros(4), before=chunk(b"iCCP", b"p\0\0" + zeros(500_000_000))),
    ),
    Bomb("tiff of 65,535 entries", (BOMB,), lambda: tiff([(n, 7, 2**31, 8) for n in range(65_535)], [bytes(64)])),
    Bomb(
        "tiff with 900 entries of 8 MB each",
        (BOMB,),
        lambda: tiff([(40_000 + n, 7, 8_000_000, ("blob", 0)) for n in range(900)], [bytes(8_000_000)]),
    ),
    # frames
    Bomb("gif of 1,000,000 frames", (FINE,), lambda: gif(64, 64, frames=1_000_000)),
    Bomb(
        "gif whose frame is larger than its screen",
        (BOMB,),
        lambda: gif(1, 1).replace(b",\0\0\0\0\1\0\1\0", b",\0\0\0\0" + b"\xff" * 4),
    ),
    Bomb("png of 15,000 missing frames", (CORRUPT,), lambda: apng(15_000)),
    Bomb("png that declares 2**31 frames", (FINE, CORRUPT, BOMB), lambda: apng(2**31)),
    Bomb("tiff of 50,000 directories in a circle", (FINE,), lambda: circular_tiff(50_000)),
    Bomb(
        "webp of 100,000 frames",
        (BOMB,),
        lambda: webp(vp8x(64, 64, 2) + (b"ANMF" + struct.pack("<I", 16) + bytes(16)) * 100_000),
    ),
    # palettes
    Bomb(
        "bmp of 2**32 - 1 colours",
        (FINE, CORRUPT, TRUNCATED),
        lambda: bmp(64, 64, 8, 0, bytes(4_096), colours=2**32 - 1),
    ),
    Bomb(
        "tiff of 2**32 - 1 colours",
        (BOMB, CORRUPT),
        lambda: tiff(
            [
                (256, 4, 1, 64),
                (257, 4, 1, 64),
                (258, 3, 1, 8),
                (259, 3, 1, 1),
                (262, 3, 1, 3),
                (273, 4, 1, 8),
                (279, 4, 1, 4_096),
                (320, 3, 2**32 - 1, 8),
            ],
            [bytes(4_096)],
        ),
    ),
    Bomb(
        "png of a palette of 20,000 colours",
        (FINE, CORRUPT),
        lambda: png(64, 64, zeros(64 * 65), color=3, before=chunk(b"PLTE", bytes(60_000))),
    ),
    # compression ratio
    Bomb("bmp of 64 run-length encoded megapixels in 1 KB", (BOMB,), lambda: bmp(8_000, 8_000, 8, 1, b"\0\0" * 500)),
    Bomb("bmp of 24 megapixels in 4-bit run lengths in 1 KB", (BOMB,), lambda: bmp(6_000, 4_000, 4, 2, b"\0\0" * 500)),
    Bomb(
        "bmp of 60 run-length encoded megapixels",
        (FINE, TRUNCATED, CORRUPT, TIMEOUT),
        lambda: bmp(7_650, 7_843, 8, 1, (b"\xff\1" * 30 + b"\0\0") * 7_843 + b"\0\1"),
    ),
    Bomb(
        "png of 60 megapixels, interlaced",
        (FINE, CORRUPT, TRUNCATED),
        lambda: png(7_744, 7_744, zeros(7_744 * 23_233 + 100_000), interlace=1),
    ),
    Bomb(
        "png of 60 megapixels of 64 bits per pixel",
        (FINE, MEMORY),
        lambda: png(7_744, 7_744, zeros(7_744 * (7_744 * 8 + 1)), depth=16, color=6),
    ),
    Bomb("png with 2 GB of excess data", (FINE,), lambda: png(64, 64, zeros(2_000_000_000))),
    Bomb(
        "webp of 64 megapixels of one colour",
        (FINE, MEMORY, TIMEOUT),
        lambda: encode(Image.new("RGB", (8_000, 8_000)), "WEBP", lossless=True, method=0),
    ),
    Bomb(
        "tiff of 60 fax-encoded megapixels",
        (FINE, CORRUPT, TRUNCATED),
        lambda: stripped(60_000, 1_000, 1_000, 1, b"\x80" * 300, 4),
    ),
    Bomb(
        "tiff of 60 LZW-encoded megapixels",
        (FINE, CORRUPT, TRUNCATED),
        lambda: stripped(7_744, 7_744, 7_744, 1, b"\x80\0" * 300, 5),
    ),
    # nesting and other formats, which never reach a decoder
    Bomb("icon of 144 megapixels", (OTHER_FORMAT,), lambda: icon(12_000)),
    Bomb(
        "eps with an endless loop",
        (OTHER_FORMAT,),
        lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n{} loop\n",
    ),
    Bomb("svg of a billion laughs", (OTHER_FORMAT,), svg_of_laughs),
    Bomb("pdf", (OTHER_FORMAT,), lambda: b"%PDF-1.7\n" + bytes(1_000)),
    Bomb("jpeg 2000 of 2**62 pixels", (OTHER_FORMAT,), lambda: b"\xff\x4f\xff\x51\0\x29\0\0" + b"\x7f\xff\xff\xff" * 8),
    Bomb("jpeg xl", (OTHER_FORMAT,), lambda: b"\xff\x0a" + bytes(1_000)),
    Bomb(
        "photoshop file of 30,000 layers",
        (OTHER_FORMAT,),
        lambda: b"8BPS\0\1" + bytes(6) + b"\0\3" + b"\0\0\x75\x30" * 2 + bytes(1_000),
    ),
    Bomb("portable pixmap of 2,500 megapixels", (OTHER_FORMAT,), lambda: b"P6 50000 50000 255\n"),
    Bomb("portable pixmap with 10 MB of comments", (OTHER_FORMAT,), lambda: b"P3\n" + b"#\n" * 5_000_000),
    Bomb("pixmap of C code", (NO_IMAGE,), lambda: b"/* XPM */\n" + b'"a c #000",\n' * 500_000),
    Bomb("gzip of a png of gzips", (NO_IMAGE,), lambda: gzip.compress(gzip.compress(bytes(100_000_000)))),
    Bomb("10 MB of blank lines", (NO_IMAGE,), lambda: b"\n" * 10_000_000),
)
