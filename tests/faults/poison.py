"""Messages of every kind that a topic may contain, valid and invalid, each with its expected outcome.

A kind is a function of a random generator: samples of a kind differ, and a seed reproduces them.
"""

import gzip
import io
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import cycle, islice
from random import Random
from typing import Any

import numpy as np
from PIL import Image

from models.decode import DEFAULT_LIMITS, Reason
from producer.message import build_message
from tests.faults.bombs import BOMBS

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
HEAVY_MESSAGES = 8  # of 20 MB, for any number of samples


@dataclass(frozen=True)
class Kind:
    """A kind of message: the reason for its quarantine (None: it is predicted) and the function that makes one."""

    name: str
    reason: Reason | None
    make: Callable[[Random], bytes | None]
    heavy: bool = False


@dataclass(frozen=True)
class Sample:
    """One message to send and its expected outcome."""

    kind: str
    reason: Reason | None
    value: bytes | None
    key: bytes | None
    headers: list[tuple[str, bytes]] = field(default_factory=list)


def generator(seed: int) -> Random:
    """A reproducible random generator."""
    return Random(seed)  # noqa: S311  not for secrets


# ---- building blocks


@cache
def _photographs() -> list[Image.Image]:
    from sklearn.datasets import load_sample_images  # takes a second, and most drivers of the scenarios need none

    return [Image.fromarray(image) for image in load_sample_images().images]


def picture(rng: Random, width: int = 96, height: int = 72) -> Image.Image:
    """A crop of a photograph, as RGB."""
    photograph = rng.choice(_photographs())
    left, top = rng.randrange(photograph.width - 200), rng.randrange(photograph.height - 150)
    return photograph.crop((left, top, left + 200, top + 150)).resize((width, height))


def random_pixels(rng: Random, width: int = 96, height: int = 72) -> Image.Image:
    """An RGB image that cannot be compressed, so that each of its rows takes the same number of bytes."""
    return Image.frombytes("RGB", (width, height), rng.randbytes(3 * width * height))


def encode(image: Image.Image, image_format: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, image_format, **options)
    return stream.getvalue()


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _png(width: int, height: int, body: bytes, *, text: bytes = b"", color_type: int = 0) -> bytes:
    """An 8-bit PNG that Pillow cannot write; `body` contains the compressed rows."""
    header = struct.pack(">IIBBBBB", width, height, 8, color_type, 0, 0, 0)
    extra = _chunk(b"zTXt", text) if text else b""
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + extra + _chunk(b"IDAT", body) + _chunk(b"IEND", b"")


def _patched(data: bytes, position: int, new: bytes) -> bytes:
    return data[:position] + new + data[position + len(new) :]


def _tiff_entry(data: bytes, tag: int) -> int:
    """The position of a tag's value in the first directory of a little-endian TIFF."""
    (directory,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, directory)
    for entry in range(directory + 2, directory + 2 + 12 * count, 12):
        if struct.unpack_from("<H", data, entry) == (tag,):
            return entry + 8
    raise ValueError(f"no tag {tag}")


# ---- valid images


def _plain(image_format: str, rng: Random, **options: Any) -> bytes:
    return encode(picture(rng), image_format, **options)


def _as_mode(mode: str, image_format: str, rng: Random) -> bytes:
    return encode(picture(rng).convert(mode), image_format)


def _sixteen_bits(image_format: str, rng: Random) -> bytes:
    gray = np.asarray(picture(rng).convert("L"), np.uint16) * 257
    return encode(Image.fromarray(gray), image_format)


def _thin(width: int, height: int, rng: Random) -> bytes:
    color = (rng.randrange(256), rng.randrange(256), rng.randrange(256))
    return encode(Image.new("RGB", (width, height), color), "PNG")


def _animated(image_format: str, rng: Random) -> bytes:
    frames = [picture(rng), picture(rng), picture(rng)]
    return encode(frames[0], image_format, save_all=True, append_images=frames[1:])


def _rotated(rng: Random) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = rng.randrange(1, 9)
    return encode(picture(rng), "JPEG", exif=exif)


def _circular_tiff(rng: Random) -> bytes:
    """A TIFF whose last directory links to the first, so that following the links never ends."""
    data = _plain("TIFF", rng)
    (directory,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, directory)
    return _patched(data, directory + 2 + 12 * count, struct.pack("<I", directory))


def _large(rng: Random) -> bytes:
    """An incompressible bitmap of 19 MB."""
    side = 2_500
    return encode(random_pixels(rng, side, side), "BMP")


GOOD = (
    *(Kind(name.lower(), None, partial(_plain, name)) for name in FORMATS),
    Kind("avif", None, partial(_plain, "AVIF")),
    Kind("jpeg without its end marker", None, lambda rng: _plain("JPEG", rng)[:-2]),
    Kind("jpeg after a line of text", None, lambda rng: b"made by a camera\r\n" + _plain("JPEG", rng)),
    Kind("progressive jpeg", None, partial(_plain, "JPEG", progressive=True)),
    Kind("jpeg with an unreadable exif", None, partial(_plain, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")),
    Kind("jpeg with trailing bytes", None, lambda rng: _plain("JPEG", rng) + b"made by a camera"),
    Kind("jpeg, rotated by exif", None, _rotated),
    Kind("cmyk jpeg", None, partial(_as_mode, "CMYK", "JPEG")),
    Kind("cmyk tiff", None, partial(_as_mode, "CMYK", "TIFF")),
    Kind("gray jpeg", None, partial(_as_mode, "L", "JPEG")),
    Kind("bilevel tiff", None, partial(_as_mode, "1", "TIFF")),
    Kind("png with alpha", None, partial(_as_mode, "RGBA", "PNG")),
    Kind("gray png with alpha", None, partial(_as_mode, "LA", "PNG")),
    Kind("palette png", None, partial(_as_mode, "P", "PNG")),
    Kind("palette gif with transparency", None, lambda rng: encode(picture(rng).convert("P"), "GIF", transparency=0)),
    Kind("16-bit png", None, partial(_sixteen_bits, "PNG")),
    Kind("16-bit tiff", None, partial(_sixteen_bits, "TIFF")),
    Kind("lossless webp", None, partial(_plain, "WEBP", lossless=True)),
    Kind("lzw tiff", None, partial(_plain, "TIFF", compression="tiff_lzw")),
    *(Kind(f"animated {name.lower()}", None, partial(_animated, name)) for name in ("GIF", "WEBP", "PNG", "TIFF")),
    Kind("tiff with circular directories", None, _circular_tiff),
    Kind("1x100000", None, partial(_thin, 1, 100_000)),
    Kind("100000x1", None, partial(_thin, 100_000, 1)),
    Kind("1x1", None, partial(_thin, 1, 1)),
    Kind("19 MB bitmap", None, _large, heavy=True),
)


# ---- invalid images


def _noise(size: int, rng: Random) -> bytes:
    return b"\x93noise" + rng.randbytes(size)  # not the signature of any image format


def _zip(content: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("image.png", content)
    return stream.getvalue()


@cache
def _zip_bomb() -> bytes:
    return _zip(bytes(50_000_000))


def _wrong_magic(image_format: str, rng: Random) -> bytes:
    return b"\0\0\0" + _plain(image_format, rng)[3:]


def _cut(image_format: str, quarters: int, rng: Random) -> bytes:
    """The first `quarters` quarters of the bytes, and thus of the rows. Three quarters of a photograph's bytes can
    contain seven eighths of its rows, which are sufficient for a prediction."""
    data = encode(random_pixels(rng), image_format)
    return data[: len(data) * quarters // 4]


@cache
def _large_png() -> bytes:
    """A complete PNG of 65,000,000 pixels, which exceeds the limit, in 65 KB."""
    compressor = zlib.compressobj()
    body = b"".join(compressor.compress(bytes(8_126)) for _ in range(8_000)) + compressor.flush()
    return _png(8_125, 8_000, body)


@cache
def _text_bomb() -> bytes:
    return _png(1, 1, zlib.compress(b"\0\0"), text=b"comment\0\0" + zlib.compress(bytes(50_000_000)))


def _huge(image_format: str, rng: Random) -> bytes:
    """A small file whose header declares about a thousand megapixels."""
    data = _plain(image_format, rng)
    match image_format:
        case "PNG":
            return _png(50_000, 50_000, b"", color_type=2)
        case "JPEG":
            frame = data.index(b"\xff\xc0")
            return _patched(data, frame + 5, struct.pack(">HH", 65_500, 65_500))
        case "GIF":
            return _patched(data, 6, struct.pack("<HH", 65_535, 65_535))
        case "BMP":
            return _patched(data, 18, struct.pack("<ii", 40_000, 40_000))
        case "TIFF":
            for tag in (256, 257):  # width, length; as long instead of short
                position = _tiff_entry(data, tag)
                data = _patched(data, position - 6, struct.pack("<HII", 4, 1, 40_000))
            return data
        case _:
            extended = struct.pack("<4sI4x", b"VP8X", 10) + (16_382).to_bytes(3, "little") * 2
            body = b"WEBP" + extended + data[12:]
            return b"RIFF" + struct.pack("<I", len(body)) + body


def _many_scans(rng: Random) -> bytes:
    data = _plain("JPEG", rng, progressive=True)
    last_scan = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last_scan * 200 + b"\xff\xd9"


def _damaged(image_format: str, rng: Random, **options: Any) -> bytes:
    """An image of full length with overwritten bytes in the middle."""
    data = _plain(image_format, rng, **options)
    middle = len(data) // 2
    return _patched(data, middle, b"\xff" * 64)


def _tiff_in_tiff(rng: Random) -> bytes:
    """A TIFF whose only strip is declared as JPEG and contains another TIFF."""
    outer = encode(picture(rng), "TIFF", compression="jpeg", tiffinfo={278: 72})
    start, size = (struct.unpack_from("<I", outer, _tiff_entry(outer, tag))[0] for tag in (273, 279))
    inner = _plain("TIFF", rng)[:size]
    return _patched(outer, start, inner.ljust(size, b"\0"))


def _float_tiff(rng: Random) -> bytes:
    return encode(Image.fromarray(np.full((8, 8), rng.random(), np.float32)), "TIFF")


def _int_tiff(rng: Random) -> bytes:
    return encode(Image.fromarray(np.full((8, 8), rng.randrange(1 << 30), np.int32)), "TIFF")


def _always(data: bytes | None) -> Callable[[Random], bytes | None]:
    return lambda _: data


_EMPTY_JPEG = b"\xff\xd8\xff\xe0\0\x10JFIF\0\1\1\0\0\1\0\1\0\0\xff\xd9"
_HEIC = struct.pack(">I4s4s4s4s4s", 24, b"ftyp", b"heic", b"\0\0\0\0", b"mif1", b"heic") + bytes(200)
_MP4 = struct.pack(">I4s4s4s4s4s", 24, b"ftyp", b"isom", b"\0\0\2\0", b"isom", b"mp41") + bytes(200)
_OTHER_FORMATS = ("PPM", "ICO", "TGA", "JPEG2000", "PCX", "DDS", "SGI")

BAD = (
    Kind("tombstone", Reason.MISSING, _always(None)),
    Kind("no bytes", Reason.EMPTY, _always(b"")),
    Kind("20 MiB and a byte", Reason.TOO_LARGE, lambda rng: rng.randbytes(DEFAULT_LIMITS.max_bytes + 1), heavy=True),
    Kind("19 MB of noise", Reason.NOT_AN_IMAGE, partial(_noise, 19_000_000), heavy=True),
    Kind("4 KB of noise", Reason.NOT_AN_IMAGE, partial(_noise, 4_096)),
    Kind("one byte", Reason.NOT_AN_IMAGE, _always(b"\xff")),
    Kind("zeros", Reason.NOT_AN_IMAGE, _always(bytes(1_000))),
    Kind("html", Reason.NOT_AN_IMAGE, _always(b"<!DOCTYPE html><html><body>404 Not Found</body></html>")),
    Kind("json", Reason.NOT_AN_IMAGE, _always(b'{"error": "no such image"}')),
    Kind("svg", Reason.FORMAT_NOT_ALLOWED, _always(b'<svg xmlns="http://www.w3.org/2000/svg"><rect width="9"/></svg>')),
    Kind(
        "jpeg after the headers of a form",
        Reason.NOT_AN_IMAGE,
        lambda rng: b"--b\r\nContent-Type: image/jpeg\r\n\r\n" + _plain("JPEG", rng),
    ),
    Kind("text like a bitmap", Reason.NOT_AN_IMAGE, _always(b"BMW and other words that begin like a bitmap")),
    Kind("utf-16 text", Reason.NOT_AN_IMAGE, _always("no image at all".encode("utf-16"))),
    Kind("pdf", Reason.FORMAT_NOT_ALLOWED, _always(b"%PDF-1.7\n1 0 obj\n<< /Type /Catalog >>\nendobj\n")),
    Kind("executable", Reason.NOT_AN_IMAGE, _always(b"\x7fELF\x02\x01\x01" + bytes(200))),
    Kind("pickle", Reason.NOT_AN_IMAGE, lambda rng: pickle.dumps({"image": rng.randbytes(100)})),
    Kind("zip of an image", Reason.NOT_AN_IMAGE, lambda rng: _zip(_plain("PNG", rng))),
    Kind("zip bomb", Reason.NOT_AN_IMAGE, lambda _: _zip_bomb()),
    Kind("gzip of an image", Reason.NOT_AN_IMAGE, lambda rng: gzip.compress(_plain("PNG", rng))),
    Kind("wav", Reason.NOT_AN_IMAGE, lambda rng: b"RIFF\x24\x08\0\0WAVEfmt " + rng.randbytes(2_048)),
    Kind("mp4", Reason.NOT_AN_IMAGE, _always(_MP4)),
    *(Kind(f"{name.lower()}, wrong magic", Reason.NOT_AN_IMAGE, partial(_wrong_magic, name)) for name in FORMATS[:4]),
    *(Kind(name.lower(), Reason.FORMAT_NOT_ALLOWED, partial(_plain, name)) for name in _OTHER_FORMATS),
    Kind("heic", Reason.FORMAT_NOT_ALLOWED, _always(_HEIC)),
    *(Kind(f"{name.lower()} of huge size", Reason.DECOMPRESSION_BOMB, partial(_huge, name)) for name in FORMATS),
    Kind("png of 65 megapixels", Reason.DECOMPRESSION_BOMB, lambda _: _large_png()),
    Kind("png with 50 MB of text", Reason.DECOMPRESSION_BOMB, lambda _: _text_bomb()),
    Kind("jpeg of 200 scans", Reason.DECOMPRESSION_BOMB, _many_scans),
    *(
        Kind(f"{name.lower()}, {quarters}/4", Reason.TRUNCATED, partial(_cut, name, quarters))
        for name in FORMATS
        for quarters in (1, 2, 3)
    ),
    Kind("jpeg header only", Reason.TRUNCATED, _always(b"\xff\xd8\xff\xe0\x00\x10JFIF\x00")),
    Kind("damaged png", Reason.CORRUPT, partial(_damaged, "PNG")),
    Kind("damaged lzw tiff", Reason.CORRUPT, partial(_damaged, "TIFF", compression="tiff_lzw")),
    Kind("jpeg without content", Reason.CORRUPT, _always(_EMPTY_JPEG)),
    Kind("png with a wrong checksum", Reason.CORRUPT, lambda rng: _patched(_plain("PNG", rng), 29, b"\0\0\0\0")),
    Kind("tiff without entries", Reason.CORRUPT, _always(b"II*\0\x08\0\0\0\0\0\0\0\0\0" + bytes(100))),
    Kind("tiff in tiff", Reason.CORRUPT, _tiff_in_tiff),
    Kind("tiff of floats", Reason.UNSUPPORTED_MODE, _float_tiff),
    Kind("tiff of 32-bit integers", Reason.UNSUPPORTED_MODE, _int_tiff),
    *(
        Kind(bomb.name, bomb.outcomes[0], lambda _, make=bomb.make: make(), heavy=bomb.heavy)
        for bomb in BOMBS
        if len(bomb.outcomes) == 1 and bomb.outcomes[0] is not None
    ),
)


# ---- messages


def _enveloped(kind: Kind, number: int, rng: Random) -> Sample:
    """A message as `imagestream publish` sends it; one in eight has a missing or invalid key or invalid headers."""
    value = kind.make(rng)
    key, headers = f"{kind.name} {number}".encode(), []
    match rng.randrange(32):
        case 0 if value is not None:  # Kafka requires a key or a value
            key = None
        case 1:
            key, headers = rng.randbytes(5_000), [("label", rng.randbytes(50))]
        case 2:
            headers = [("label", b"a"), ("label", b""), ("", b"?"), ("ce_source", b"x" * 50_000)]
        case 3:
            headers = [("ce_time", b"yesterday"), ("ce_specversion", b"-1"), ("traceparent", b"\xff")]
        case _:
            message = build_message(value or b"", f"{kind.name}/{number}", image_id=key.decode(), label="any")
            headers = [*message.headers]
    return Sample(kind.name, kind.reason, value, key, headers)


def samples(rng: Random, *, good: int, bad: int, heavy: tuple[Kind, ...] = ()) -> list[Sample]:
    """`good` valid and `bad` invalid messages, shuffled: each kind in turn, and those of `heavy` a few times."""
    made: list[Sample] = []
    for kinds, count in ((GOOD, good), (BAD, bad)):
        light = [kind for kind in kinds if not kind.heavy]
        large = [kind for kind in heavy if kind in kinds]
        few = list(islice(cycle(large), min(HEAVY_MESSAGES, max(1, count // 50)))) if large else []
        picked = [*few, *(light[number % len(light)] for number in range(count - len(few)))]
        made += [_enveloped(kind, number, rng) for number, kind in enumerate(picked)]
    rng.shuffle(made)
    return made
